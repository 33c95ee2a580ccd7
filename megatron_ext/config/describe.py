"""A model's size, work and memory from its shape alone: arithmetic, nothing is built.

Used by tools/describe_model.py. Parameters are exact (a test compares them with the built model's);
operations count matmuls; memory is an estimate, with what it counts said where it counts it.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ext.config.presets import PRESETS, Preset


@dataclass(frozen=True)
class Shape:
    """A decoder's shape; sizes in elements, ``vocabulary`` with its padding."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_width: int
    ffn: int
    vocabulary: int
    sequence: int
    gated: bool = True
    tied: bool = False
    biases: bool = False
    qkv_biases: bool = False
    norm_vectors: int = 1
    qk_norms: bool = False
    learned_positions: int = 0
    series_terms: int = 0
    shortcuts: int = 0
    reduction: int = 32

    @property
    def query_width(self) -> int:
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        return self.groups * self.head_width


def shape_of(args: Namespace, vocabulary: int) -> Shape:
    """The shape that parsed arguments describe, for an embedding of ``vocabulary`` rows."""
    return Shape(
        layers=args.num_layers,
        hidden=args.hidden_size,
        heads=args.num_attention_heads,
        groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_width=args.kv_channels,
        ffn=args.ffn_hidden_size,
        vocabulary=vocabulary,
        sequence=args.seq_length,
        gated=args.swiglu or args.quick_geglu,
        tied=not args.untie_embeddings_and_output_weights,
        biases=args.add_bias_linear,
        qkv_biases=args.add_qkv_bias or args.add_bias_linear,
        norm_vectors=1 if args.normalization == "RMSNorm" else 2,
        qk_norms=args.qk_layernorm,
        learned_positions=(
            args.max_position_embeddings if args.position_embedding_type == "learned_absolute" else 0
        ),
        series_terms=args.series_activation_order,
        shortcuts=args.augmented_shortcuts,
        reduction=args.augmented_shortcut_reduction,
    )


def shape_of_preset(preset: Preset) -> Shape:
    """A preset's shape at the vocabulary that it was designed for, padded to a multiple of 128."""
    return Shape(
        layers=preset.layers,
        hidden=preset.hidden,
        heads=preset.heads,
        groups=preset.heads,
        head_width=preset.hidden // preset.heads,
        ffn=preset.ffn,
        vocabulary=-(-preset.vocabulary // 128) * 128,
        sequence=preset.sequence,
        series_terms=2,
        shortcuts=1,
    )


def parameters(shape: Shape) -> dict[str, int]:
    """Part -> number of parameters; the sum is the model's."""
    s, h, f = shape, shape.hidden, shape.ffn
    qkv, fc1 = s.query_width + 2 * s.key_width, (2 if s.gated else 1) * f
    attention = h * qkv + s.query_width * h + s.qkv_biases * qkv + s.biases * h
    feed_forward = h * fc1 + f * h + s.biases * (fc1 + h)
    norms = 2 * h * s.norm_vectors + s.qk_norms * 2 * s.head_width * s.norm_vectors
    return {
        "embedding": s.vocabulary * h + s.learned_positions * h,
        "head": 0 if s.tied else s.vocabulary * h,
        "attention": s.layers * attention,
        "FFN": s.layers * feed_forward,
        "augmented shortcuts": s.layers * s.shortcuts * 2 * h * (h // s.reduction),
        "series activation": s.layers * 2 * s.series_terms * f,
        "norms": s.layers * norms + h * s.norm_vectors,
    }


def total_parameters(shape: Shape) -> int:
    """Parameters of the whole model."""
    return sum(parameters(shape).values())


def embedding_share(shape: Shape) -> float:
    """Share of embedding and head in all parameters, 0 to 1."""
    parts = parameters(shape)
    return (parts["embedding"] + parts["head"]) / sum(parts.values())


def flops_per_token(shape: Shape) -> float:
    """Operations of forward and backward for one token: 2 a multiply-add, three products a matmul.

    Causal attention counts as the half that is not masked, as Megatron-LM 0.16 counts it.
    """
    s, h = shape, shape.hidden
    attention = h * (s.query_width + 2 * s.key_width) + s.query_width * h + s.query_width * s.sequence
    feed_forward = (3 if s.gated else 2) * h * s.ffn
    shortcut = s.shortcuts * 2 * h * (h // s.reduction)
    return 6.0 * (s.layers * (attention + feed_forward + shortcut) + h * s.vocabulary)


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
    bytes_each: int = 4


def layout_of(args: Namespace) -> Layout:
    """The layout that parsed arguments describe."""
    return Layout(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        data=args.data_parallel_size,
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
        recompute=args.recompute_granularity == "full",
        micro_batch=args.micro_batch_size,
        micro_batches=max(1, args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)),
        bytes_each=2 if args.bf16 or getattr(args, "fp16", False) else 4,
    )


def vocabulary_of(args: Namespace) -> int:
    """Rows of the embedding: what is given, or what the preset was designed for, padded.

    Raises:
        ValueError: neither a size nor a preset is given.
    """
    if args.padded_vocab_size:
        return args.padded_vocab_size
    size, unit = args.vocab_size, args.make_vocab_size_divisible_by
    if size is None and args.model_preset in PRESETS:
        size = PRESETS[args.model_preset].vocabulary
    if size is None:
        raise ValueError("the size of the vocabulary is not known: give --vocab-size")
    return -(-size // unit) * unit


def memory(shape: Shape, layout: Layout) -> dict[str, float]:
    """What -> bytes on the pipeline stage that needs most; activations are an estimate."""
    stages = [_stage_memory(shape, layout, stage) for stage in range(layout.pipeline)]
    return max(stages, key=lambda stage: sum(stage.values()))


def _stage_memory(shape: Shape, layout: Layout, stage: int) -> dict[str, float]:
    held = parameters_of_rank(shape, layout, stage)
    # Adam's two moments, and an fp32 copy of weights that are not fp32 themselves.
    state = 8 + (4 if layout.bytes_each < 4 else 0)
    return {
        "weights": held * layout.bytes_each,
        "gradients": held * 4,
        "optimizer": held * state / (layout.data if layout.distributed_optimizer else 1),
        "activations": _activations(shape, layout, stage),
    }


def parameters_of_rank(shape: Shape, layout: Layout, stage: int) -> float:
    """Parameters on one rank of a pipeline stage; shortcuts and norms are whole on every rank."""
    parts, split = parameters(shape), layout.tensor
    final_norm = shape.hidden * shape.norm_vectors
    divided = parts["attention"] + parts["FFN"] + parts["series activation"]
    whole = parts["augmented shortcuts"] + parts["norms"] - final_norm
    held = (divided / split + whole) / layout.pipeline
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        held += parts["embedding"] / split
    if last:
        # A tied head is a copy of the embedding where it is not the same rank.
        head = parts["embedding"] if shape.tied and not first else parts["head"]
        held += head / split + final_norm
    return held


def _activations(shape: Shape, layout: Layout, stage: int) -> float:
    """Tensors that a stage keeps for its backward pass, with as many micro batches as 1F1B has there."""
    tokens = layout.micro_batch * shape.sequence
    in_flight = min(layout.pipeline - stage, layout.micro_batches)
    layers = shape.layers / layout.pipeline
    one_layer = layer_activations(shape, layout)
    residual = shape.hidden / (layout.tensor if layout.sequence_parallel else 1)
    # Recomputation keeps each layer's input, and all of the one layer that is computed again.
    kept = layers * residual * in_flight + one_layer if layout.recompute else layers * one_layer * in_flight
    logits = shape.vocabulary / layout.tensor * 4 if stage == layout.pipeline - 1 else 0
    return tokens * (kept * layout.bytes_each + logits)


def layer_activations(shape: Shape, layout: Layout) -> float:
    """Elements for each token that one layer keeps, without dropout and with flash attention.

    Residual stream and normed input, twice (4 h); queries and keys before and after the rotation,
    values, and the attention's output; gate and up, and their product; the shortcut's bottleneck.
    """
    s = shape
    stream = 4 * s.hidden / (layout.tensor if layout.sequence_parallel else 1)
    attention = (3 * s.query_width + 3 * s.key_width) / layout.tensor
    feed_forward = (3 if s.gated else 2) * s.ffn / layout.tensor
    return stream + attention + feed_forward + 2 * s.shortcuts * (s.hidden // s.reduction)


def candidates(
    budget: float, like: Shape, depths: range = range(8, 49, 2), tolerance: float = 0.01
) -> Iterator[Shape]:
    """Shapes of about ``budget`` parameters, by depth and width, for a depth against width study.

    Widths are multiples of 128, in heads of 128 (64 below 768); the FFN takes what is left, in
    multiples of 128, between 2 and 4 times the width; vocabulary, modules and length are ``like``'s.
    """
    for layers in depths:
        for hidden in range(256, 8193, 128):
            width = 128 if hidden >= 768 else 64
            heads = hidden // width
            bare = replace(
                like, layers=layers, hidden=hidden, heads=heads, groups=heads, head_width=width, ffn=0
            )
            per_channel = total_parameters(replace(bare, ffn=1)) - total_parameters(bare)
            ffn = round((budget - total_parameters(bare)) / per_channel / 128) * 128
            found = replace(bare, ffn=ffn)
            if 2 * hidden <= ffn <= 4 * hidden and abs(total_parameters(found) / budget - 1) <= tolerance:
                yield found
