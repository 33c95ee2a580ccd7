"""A model's size, work and memory from its shape alone: arithmetic, nothing is built.

Used by tools/describe_model.py. Parameters are exact (a test compares them with the built model's);
operations count matmuls; memory is an estimate, with what it counts said where it counts it.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from megatron_ext.config import RunConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.presets import PRESETS

#: What is in a parameter's name -> the part that it belongs to; the first that is found.
_PARTS = {
    "norm": "norms",
    "augmented_shortcut": "augmented shortcuts",
    "series_activation": "series activation",
    "embedding": "embedding",
    "output_layer": "head",
    "self_attention": "attention",
    "mlp": "FFN",
}


def parts(model: ModelConfig) -> dict[str, int]:
    """Part -> number of parameters; the sum is the model's."""
    found = dict.fromkeys(_PARTS.values(), 0)
    for name, shape in dataclasses.replace(model, num_layers=1).parameters().items():
        part = next(part for key, part in _PARTS.items() if key in name)
        in_layer = name.startswith("decoder.layers.")
        found[part] += math.prod(shape) * (model.num_layers if in_layer else 1)
    return found


def embedding_share(model: ModelConfig) -> float:
    """Share of embedding and head in all parameters, 0 to 1."""
    of = parts(model)
    return (of["embedding"] + of["head"]) / sum(of.values())


@dataclass(frozen=True)
class Layout:
    """How a model is divided and trained; ``bytes_each`` is 4 for fp32 and 2 for bf16 weights."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: bool = False
    micro_batch: int = 1
    micro_batches: int = 1
    seq_length: int = 2048
    bytes_each: int = 4


def layout_of(run: RunConfig) -> Layout:
    """The layout that parsed arguments describe."""
    return Layout(
        tensor=run.parallel.tensor_model_parallel_size,
        pipeline=run.parallel.pipeline_model_parallel_size,
        data=run.parallel.data_parallel_size,
        sequence_parallel=run.parallel.sequence_parallel,
        distributed_optimizer=run.parallel.use_distributed_optimizer,
        recompute=run.recompute.recompute_granularity == "full",
        micro_batch=run.training.micro_batch_size,
        micro_batches=max(1, run.training.global_batch_size // run.samples_at_once),
        seq_length=run.data.seq_length,
        bytes_each=2 if run.precision.bf16 or run.precision.fp16 else 4,
    )


def vocabulary_of(run: RunConfig) -> int:
    """Rows of the embedding: what is given, or what the preset was designed for, padded.

    Raises:
        ValueError: neither a size nor a preset is given.
    """
    if run.model.padded_vocab_size:
        return run.model.padded_vocab_size
    size, unit = run.tokenizer.vocab_size, run.tokenizer.make_vocab_size_divisible_by
    if size is None and run.init.model_preset in PRESETS:
        size = PRESETS[run.init.model_preset].softmax_vocab_size
    if size is None:
        raise ValueError("the size of the vocabulary is not known: give --vocab-size")
    return -(-size // unit) * unit


def with_vocabulary(run: RunConfig) -> ModelConfig:
    """The model of a run, with the rows of its vocabulary; raises ValueError where there is none."""
    return replace(run.model, padded_vocab_size=vocabulary_of(run))


def memory(model: ModelConfig, layout: Layout) -> dict[str, float]:
    """What -> bytes on the pipeline stage that needs most; activations are an estimate."""
    stages = [_stage_memory(model, layout, stage) for stage in range(layout.pipeline)]
    return max(stages, key=lambda stage: sum(stage.values()))


def _stage_memory(model: ModelConfig, layout: Layout, stage: int) -> dict[str, float]:
    held = parameters_of_rank(model, layout, stage)
    # Adam's two moments, and an fp32 copy of weights that are not fp32 themselves.
    state = 8 + (4 if layout.bytes_each < 4 else 0)
    return {
        "weights": held * layout.bytes_each,
        "gradients": held * 4,
        "optimizer": held * state / (layout.data if layout.distributed_optimizer else 1),
        "activations": _activations(model, layout, stage),
    }


def parameters_of_rank(model: ModelConfig, layout: Layout, stage: int) -> float:
    """Parameters on one rank of a pipeline stage; shortcuts and norms are whole on every rank."""
    of, split = parts(model), layout.tensor
    final_norm = model.hidden_size * (1 if model.normalization == "RMSNorm" else 2)
    divided = of["attention"] + of["FFN"] + of["series activation"]
    whole = of["augmented shortcuts"] + of["norms"] - final_norm
    held = (divided / split + whole) / layout.pipeline
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        held += of["embedding"] / split
    if last:
        # A tied head is a copy of the embedding where it is not the same rank.
        head = of["embedding"] if model.tied and not first else of["head"]
        held += head / split + final_norm
    return held


def _activations(model: ModelConfig, layout: Layout, stage: int) -> float:
    """Tensors that a stage keeps for its backward pass, with as many micro batches as 1F1B has there."""
    tokens = layout.micro_batch * layout.seq_length
    in_flight = min(layout.pipeline - stage, layout.micro_batches)
    layers = model.num_layers / layout.pipeline
    one_layer = layer_activations(model, layout)
    residual = model.hidden_size / (layout.tensor if layout.sequence_parallel else 1)
    # Recomputation keeps each layer's input, and all of the one layer that is computed again.
    kept = layers * residual * in_flight + one_layer if layout.recompute else layers * one_layer * in_flight
    logits = model.vocab_rows / layout.tensor * 4 if stage == layout.pipeline - 1 else 0
    return tokens * (kept * layout.bytes_each + logits)


def layer_activations(model: ModelConfig, layout: Layout) -> float:
    """Elements for each token that one layer keeps, without dropout and with flash attention.

    Residual stream and normed input, twice (4 h); queries and keys before and after the rotation,
    values, and the attention's output; gate and up, and their product; the shortcut's bottleneck.
    """
    stream = 4 * model.hidden_size / (layout.tensor if layout.sequence_parallel else 1)
    attention = 3 * (model.query_width + model.query_groups * model.kv_channels) / layout.tensor
    feed_forward = (2 + model.gated) * model.ffn_hidden_size / layout.tensor
    return stream + attention + feed_forward + 2 * model.shortcut_width


def candidates(
    budget: float, like: ModelConfig, depths: range = range(8, 49, 2), tolerance: float = 0.01
) -> Iterator[ModelConfig]:
    """Models of about ``budget`` parameters, by depth and width, for a depth against width study.

    Widths are multiples of 128, in heads of 128 (64 below 768); the FFN takes what is left, in
    multiples of 128, between 2 and 4 times the width; vocabulary and modules are ``like``'s.
    """
    for layers in depths:
        for hidden in range(256, 8193, 128):
            width = 128 if hidden >= 768 else 64
            of = partial(
                replace,
                like,
                num_layers=layers,
                hidden_size=hidden,
                num_attention_heads=hidden // width,
                kv_channels=width,
            )
            one, two = (of(ffn_hidden_size=ffn).num_parameters for ffn in (1, 2))
            ffn = 128 * round(((budget - one) / (two - one) + 1) / 128)
            found = of(ffn_hidden_size=ffn) if ffn > 0 else like
            if 2 * hidden <= ffn <= 4 * hidden and abs(found.num_parameters / budget - 1) <= tolerance:
                yield found
