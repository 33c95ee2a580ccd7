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


def engine_is_there(args, typed):
    if args.transformer_impl == "inference_optimized":
        yield "--transformer-impl inference_optimized is for inference; use local or transformer_engine"
    if args.transformer_impl == "transformer_engine" and not args.has_transformer_engine:
        yield (
            "--transformer-impl transformer_engine needs a GPU and the package transformer-engine, "
            "which are not here; use --transformer-impl local"
        )


def engine_features(args, typed):
    if args.transformer_impl == "transformer_engine":
        return
    for given, spelled in (
        (args.fp8, "--fp8-format"),
        (args.fp4, "--fp4-format"),
        (args.context_parallel_size > 1, "--context-parallel-size above 1"),
    ):
        if given:
            yield f"{spelled} needs --transformer-impl transformer_engine, on a GPU"


def eight_bit_formats_agree(args, typed):
    if args.fp8 and args.fp4:
        yield "--fp8-format and --fp4-format exclude each other"
    if args.fp8_param_gather and not args.use_distributed_optimizer:
        yield "--fp8-param-gather needs --use-distributed-optimizer"
    if args.fp8 and args.first_last_layers_bf16 and args.fp8_recipe == "delayed":
        yield "--first-last-layers-bf16 does not go with --fp8-recipe delayed; use another recipe"
    if args.fp8_recipe == "custom" and args.fp8 or args.fp4_recipe == "custom" and args.fp4:
        yield "a custom recipe for FP8 or FP4 needs code of its own and is not supported here"


def reduction_formats_agree(args, typed):
    if args.grad_reduce_in_bf16 and typed.get("accumulate_allreduce_grads_in_fp32"):
        yield "--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32 exclude each other"


RULES = (
    positions_fit,
    position_embedding_is_supported,
    heads_divide_hidden,
    groups_divide_heads,
    one_activation,
    series_activation_has_a_gate,
    shortcut_divides_hidden,
    one_precision,
    half_precision_needs_a_gpu,
    engine_is_there,
    engine_features,
    eight_bit_formats_agree,
    reduction_formats_agree,
)
