"""Calculates a model's size and FLOPs from its shape, without building it.

Used by tools/describe_model.py. Parameters are exact (a test compares them with the built model); FLOPs
count matmuls. footprint.py calculates the memory of a rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from megatron_ext.config import RunConfig
from megatron_ext.config.data import padded
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.presets import PRESETS

#: Text in a parameter's name -> the part it belongs to; the first match counts.
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
    """Part -> number of parameters; the parts sum to the whole model."""
    counts = dict.fromkeys(_PARTS.values(), 0)
    for name, shape in model.one_layer.parameters().items():
        part = next(part for key, part in _PARTS.items() if key in name)
        in_layer = name.startswith("decoder.layers.")
        counts[part] += math.prod(shape) * (model.num_layers if in_layer else 1)
    return counts


def embedding_share(model: ModelConfig) -> float:
    """Fraction of all parameters in embedding and head."""
    of = parts(model)
    return (of["embedding"] + of["head"]) / sum(of.values())


@dataclass(frozen=True)
class Layout:
    """How a model is divided and trained; ``bytes_each`` is 4 for fp32 and 2 for bf16 weights.

    ``stage_layers`` are the layers of each chunk of each pipeline stage; by default all stages have one chunk
    with the same number of layers. ``kernels``: whether the project's kernels are available, Triton's on a
    GPU or the compiled ones on a CPU; without them activations need more memory. ``layer_wise``: data
    parallel ranks divide whole tensors of the optimizer's state among them.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    stage_layers: tuple[tuple[int, ...], ...] = ()
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    muon: bool = False
    layer_wise: bool = False
    recompute: bool = False
    micro_batch: int = 1
    micro_batches: int = 1
    seq_length: int = 2048
    bytes_each: int = 4
    kernels: bool = True

    def chunks(self, model: ModelConfig, stage: int) -> tuple[float, ...]:
        """Layers of each chunk on a rank of the pipeline stage; several with the interleaved schedule."""
        return self.stage_layers[stage] if self.stage_layers else (model.num_layers / self.pipeline,)

    def layers(self, model: ModelConfig, stage: int) -> float:
        """Layers on a pipeline stage."""
        return sum(self.chunks(model, stage))

    @property
    def stream_split(self) -> int:
        """Number of ranks that divide the residual stream, by sequence parallelism."""
        return self.tensor if self.sequence_parallel else 1


def layout_of(run: RunConfig) -> Layout:
    """The layout of a run."""
    return Layout(
        tensor=run.parallel.tensor_model_parallel_size,
        pipeline=run.parallel.pipeline_model_parallel_size,
        data=run.parallel.data_parallel_size,
        stage_layers=_stage_layers(run.model.num_layers, run.parallel),
        sequence_parallel=run.parallel.sequence_parallel,
        distributed_optimizer=run.parallel.use_distributed_optimizer,
        muon=run.optimizer.is_muon,
        layer_wise=run.optimizer.optimizer == "dist_muon",
        recompute=run.recompute.recompute_granularity == "full",
        micro_batch=run.training.micro_batch_size,
        micro_batches=max(1, run.training.global_batch_size // run.samples_at_once),
        seq_length=run.data.seq_length,
        bytes_each=2 if run.precision.bf16 or run.precision.fp16 else 4,
    )


def _stage_layers(layers: int, parallel: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    """Layers of each chunk of each stage, as Megatron-Core divides them (get_num_layers_to_build)."""
    stages, chunks = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
    )
    ends = (parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers)
    extra = (parallel.account_for_embedding_in_pipeline_split, parallel.account_for_loss_in_pipeline_split)
    divided = layers + sum(extra) - sum(end or 0 for end in ends)
    alike = divided // max(1, stages - sum(end is not None for end in ends))
    totals = [alike] * stages
    for place, end in zip((0, -1), ends, strict=True):
        totals[place] = totals[place] if end is None else end
    chunk_layers = [[total // chunks] * chunks for total in totals]
    chunk_layers[0][0] -= extra[0]
    chunk_layers[-1][-1] -= extra[1]
    return tuple(map(tuple, chunk_layers))


def vocabulary_of(run: RunConfig) -> int:
    """Rows of the embedding: the given size, or that of the preset, padded.

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
    return padded(size, unit)


def with_vocabulary(run: RunConfig) -> ModelConfig:
    """The model of a run with its vocabulary size; raises ValueError if that is unknown."""
    return replace(run.model, padded_vocab_size=vocabulary_of(run))


def final_norm(model: ModelConfig) -> int:
    """Parameters of the norm before the output layer, which is replicated on the last stage."""
    return model.hidden_size * (1 if model.normalization == "RMSNorm" else 2)


def parameters_of_rank(model: ModelConfig, layout: Layout, stage: int) -> float:
    """Parameters on one rank of a pipeline stage; shortcuts and norms are replicated on every rank."""
    of, split = parts(model), layout.tensor
    divided = of["attention"] + of["FFN"] + of["series activation"]
    whole = of["augmented shortcuts"] + of["norms"] - final_norm(model)
    held = (divided / split + whole) * layout.layers(model, stage) / model.num_layers
    last = stage == layout.pipeline - 1
    return held + vocabulary_of_rank(model, layout, stage) + (final_norm(model) if last else 0)


def vocabulary_of_rank(model: ModelConfig, layout: Layout, stage: int) -> float:
    """Parameters of embedding and output layer on one rank of a pipeline stage."""
    of, first = parts(model), stage == 0
    held = of["embedding"] if first else 0
    if stage == layout.pipeline - 1:
        # A tied head on another stage than the embedding is a copy.
        held += of["embedding"] if model.tied and not first else of["head"]
    return held / layout.tensor


def flops_of_rank(model: ModelConfig, layout: Layout, stage: int) -> float:
    """FLOPs of a rank of a pipeline stage per token of its micro batches, including recomputation."""
    head = 6.0 * model.hidden_size * model.vocab_rows
    shortcuts = 12.0 * model.num_layers * model.hidden_size * model.shortcut_width
    divided = model.flops_per_token(layout.seq_length) - head - shortcuts
    layer = (divided / layout.tensor + shortcuts / layout.stream_split) / model.num_layers
    layers = layout.layers(model, stage) * layer * (8 if layout.recompute else 6) / 6
    return layers + (head / layout.tensor if stage == layout.pipeline - 1 else 0)


def candidates(
    budget: float, like: ModelConfig, depths: range = range(8, 49, 2), tolerance: float = 0.01
) -> Iterator[ModelConfig]:
    """Models of about ``budget`` parameters, by depth and width, for a depth against width study.

    Widths are multiples of 128, in heads of 128 (below 768: multiples of 64, heads of 64); the FFN gets the
    remaining budget, in multiples of 128 (below 768: of 32), between 2 and 4 times the width; vocabulary and
    modules are those of ``like``.
    """
    for layers in depths:
        for hidden in (*range(64, 768, 64), *range(768, 8193, 128)):
            width, multiple = (128, 128) if hidden >= 768 else (64, 32)
            of = partial(
                replace,
                like,
                num_layers=layers,
                hidden_size=hidden,
                num_attention_heads=hidden // width,
                kv_channels=width,
            )
            one, two = (of(ffn_hidden_size=ffn).num_parameters for ffn in (1, 2))
            ffn = multiple * round(((budget - one) / (two - one) + 1) / multiple)
            model = of(ffn_hidden_size=ffn) if ffn > 0 else like
            if 2 * hidden <= ffn <= 4 * hidden and abs(model.num_parameters / budget - 1) <= tolerance:
                yield model
