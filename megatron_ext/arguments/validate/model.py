"""Rules of the model and its number formats."""


def positions_fit(args, typed):
    if args.max_position_embeddings < args.seq_length:
        yield (
            f"--max-position-embeddings {args.max_position_embeddings} must be at least "
            f"--seq-length {args.seq_length}"
        )


def position_embedding_is_supported(args, typed):
    if args.position_embedding_type in ("mrope", "relative"):
        yield (
            f"--position-embedding-type {args.position_embedding_type} is not supported here; "
            "use rope, learned_absolute or none"
        )


def heads_divide_hidden(args, typed):
    if args.kv_channels is None:
        yield (
            f"--hidden-size {args.hidden_size} is not divisible by --num-attention-heads "
            f"{args.num_attention_heads}; change one, or give --kv-channels"
        )


def groups_divide_heads(args, typed):
    if args.group_query_attention and args.num_attention_heads % args.num_query_groups:
        yield (
            f"--num-attention-heads {args.num_attention_heads} is not divisible by "
            f"--num-query-groups {args.num_query_groups}"
        )


def one_activation(args, typed):
    chosen = [name for name in ("swiglu", "squared_relu", "quick_geglu") if getattr(args, name)]
    if len(chosen) > 1:
        yield f"{' and '.join('--' + name.replace('_', '-') for name in chosen)} exclude each other"


def series_activation_has_a_gate(args, typed):
    if args.series_activation_order and not args.swiglu:
        yield "--series-activation-order acts on the gate of SwiGLU: add --swiglu"


def shortcut_divides_hidden(args, typed):
    if args.augmented_shortcuts and args.hidden_size % args.augmented_shortcut_reduction:
        yield (
            f"--hidden-size {args.hidden_size} is not divisible by --augmented-shortcut-reduction "
            f"{args.augmented_shortcut_reduction}"
        )


def one_precision(args, typed):
    if args.bf16 and args.fp16:
        yield "--bf16 and --fp16 exclude each other"


def half_precision_needs_a_gpu(args, typed):
    if args.fp16 and args.device == "cpu":
        yield "--fp16 needs a GPU; on a CPU use fp32 (the default) or --bf16"


def reduction_formats_agree(args, typed):
    if args.grad_reduce_in_bf16 and typed.get("accumulate_allreduce_grads_in_fp32"):
        yield "--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32 exclude each other"


RULES_OF_SHAPE = (
    positions_fit,
    position_embedding_is_supported,
    heads_divide_hidden,
    groups_divide_heads,
    one_activation,
    series_activation_has_a_gate,
    shortcut_divides_hidden,
)
RULES = (
    *RULES_OF_SHAPE,
    one_precision,
    half_precision_needs_a_gpu,
    reduction_formats_agree,
)
