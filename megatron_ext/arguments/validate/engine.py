"""Rules of Transformer Engine: its availability, FP8 recipes and shapes, CUDA graphs."""

from collections.abc import Iterator

from megatron_ext.arguments.validate.rule import Problems, Typed
from megatron_ext.config import RunConfig
from megatron_ext.platform.engine import RECIPES, recipe_problem, too_old_for_unfused_documents


def engine_is_there(run: RunConfig, typed: Typed) -> Problems:
    if run.layers.transformer_impl == "inference_optimized":
        yield "--transformer-impl inference_optimized is for inference; use local or transformer_engine"
    if run.layers.transformer_impl == "transformer_engine" and run.process.engine_problem:
        problem = run.process.engine_problem
        yield f"--transformer-impl transformer_engine: {problem}; or use --transformer-impl local"


def engine_features(run: RunConfig, typed: Typed) -> Problems:
    if run.layers.transformer_impl == "transformer_engine":
        return
    for given, spelled in (
        (run.precision.fp8, "--fp8-format"),
        (run.precision.fp4, "--fp4-format"),
        (run.parallel.context_parallel_size > 1, "--context-parallel-size above 1"),
    ):
        if given:
            yield f"{spelled} needs --transformer-impl transformer_engine, on a GPU"


def documents_are_whole_and_counted_anew(run: RunConfig, typed: Typed) -> Problems:
    """Their number changes with each batch, and no rank may have a part of one."""
    if not run.data.reset_attention_mask:
        return
    for given, spelled in (
        (run.parallel.context_parallel_size > 1, "--context-parallel-size above 1, which divides documents"),
        (run.graphs.cuda_graph_impl != "none", "--cuda-graph-impl, whose shapes are fixed"),
    ):
        if given:
            yield f"--reset-attention-mask does not go with {spelled}"


def packed_documents_have_a_kernel(run: RunConfig, typed: Typed) -> Problems:
    """In fp32 Transformer Engine has its unfused attention only."""
    if not run.data.reset_attention_mask or run.layers.transformer_impl != "transformer_engine":
        return
    unfused = run.layers.attention_backend == "unfused" or not (run.precision.bf16 or run.precision.fp16)
    if unfused and too_old_for_unfused_documents():
        yield (
            "--reset-attention-mask needs --bf16 or --fp16, and another --attention-backend than unfused, "
            "with this Transformer Engine; or use 2.11, or --transformer-impl local"
        )


def context_is_exchanged_in_one_way(run: RunConfig, typed: Typed) -> Problems:
    if len(run.parallel.cp_comm_type) > 1:
        yield "--cp-comm-type takes one value for all layers"
    shards = run.parallel.tensor_model_parallel_size * run.parallel.context_parallel_size
    groups = run.model.query_groups
    if "a2a" in run.parallel.cp_comm_type and run.parallel.context_parallel_size > 1 and groups % shards:
        yield (
            f"--cp-comm-type a2a divides the heads: {groups} heads or query groups are not divisible by "
            f"--tensor-model-parallel-size x --context-parallel-size = {shards}"
        )


def eight_bit_formats_agree(run: RunConfig, typed: Typed) -> Problems:
    if run.precision.fp8 and run.precision.fp4:
        yield "--fp8-format and --fp4-format exclude each other"
    if run.precision.fp8_param_gather and not run.parallel.use_distributed_optimizer:
        yield "--fp8-param-gather needs --use-distributed-optimizer"
    if run.precision.fp8_param_gather and run.precision.fp8_recipe == "mxfp8":
        yield "--fp8-param-gather does not go with --fp8-recipe mxfp8, whose weights cannot share a buffer"
    if (
        run.precision.fp8_recipe == "custom"
        and run.precision.fp8
        or run.precision.fp4_recipe == "custom"
        and run.precision.fp4
    ):
        yield "a custom recipe for FP8 or FP4 needs code of its own and is not supported here"


def recipe_suits_the_machine(run: RunConfig, typed: Typed) -> Problems:
    """Only on the machine of the run: a command line that is checked for another one has no GPU yet."""
    if run.precision.fp8 and run.precision.fp8_recipe in RECIPES and run.process.gpu is not None:
        problem = recipe_problem(run.precision.fp8_recipe, *run.process.gpu)
        if problem is not None:
            yield f"--fp8-recipe {run.precision.fp8_recipe} needs {problem}"


def layers_in_bf16_are_possible(run: RunConfig, typed: Typed) -> Problems:
    if not (run.precision.fp8 and run.precision.first_last_layers_bf16):
        return
    if run.precision.fp8_recipe == "delayed":
        yield "--first-last-layers-bf16 does not go with --fp8-recipe delayed; use another recipe"
    most = run.model.num_layers // run.parallel.pipeline_model_parallel_size
    for where in ("start", "end"):
        count = run.get(f"num_layers_at_{where}_in_bf16")
        if count > most:
            yield f"--num-layers-at-{where}-in-bf16 {count} exceeds the {most} layers of a pipeline stage"


def recomputed_norms_and_delayed_scaling(run: RunConfig, typed: Typed) -> Problems:
    if (
        run.precision.fp8
        and run.precision.fp8_recipe == "delayed"
        and "layernorm" in (run.recompute.recompute_modules or ())
    ):
        yield "--recompute-modules layernorm does not go with --fp8-recipe delayed; use another recipe"


def shapes_suit_fp8(run: RunConfig, typed: Typed) -> Problems:
    """Every shard of a matrix that is multiplied in FP8 must consist of whole blocks.

    A shard's columns are another matmul's rows in the backward pass, so both dimensions of a weight must be
    multiples of the columns' unit; the tokens of a micro batch are rows.
    """
    if not run.precision.fp8 or run.precision.fp8_recipe not in RECIPES or run.model.kv_channels is None:
        return
    rows, columns = RECIPES[run.precision.fp8_recipe].rows, RECIPES[run.precision.fp8_recipe].columns
    tensor = run.parallel.tensor_model_parallel_size
    yield from _uneven("--hidden-size", run.model.hidden_size, columns, 1, run.precision.fp8_recipe)
    yield from _uneven(
        "--ffn-hidden-size", run.model.ffn_hidden_size, columns, tensor, run.precision.fp8_recipe
    )
    groups = run.model.query_groups
    for count, what in (
        (run.model.num_attention_heads, "query"),
        (run.model.num_attention_heads + 2 * groups, "query, key and value"),
    ):
        width = count * run.model.kv_channels
        if width % (columns * tensor):
            yield (
                f"--fp8-recipe {run.precision.fp8_recipe}: the {width} {what} channels of {count} heads of "
                f"{run.model.kv_channels} must be a multiple of {columns} on each of "
                f"--tensor-model-parallel-size {tensor}; heads of 64 or 128 channels are"
            )
            break
    yield from _uneven_tokens(run, rows)


def _uneven(flag: str, size: int, unit: int, shards: int, recipe: str) -> Iterator[str]:
    step = unit * shards
    if size % step:
        below, above = size // step * step, -(-size // step) * step
        nearest = " or ".join(str(legal) for legal in (below, above) if legal)
        shard = f" on each of --tensor-model-parallel-size {shards}" if shards > 1 else ""
        yield f"--fp8-recipe {recipe}: {flag} {size} must be a multiple of {unit}{shard}: {nearest}"


def _uneven_tokens(run: RunConfig, rows: int) -> Iterator[str]:
    shards = run.parallel.tensor_model_parallel_size if run.parallel.sequence_parallel else 1
    shards *= run.parallel.context_parallel_size
    tokens = run.training.micro_batch_size * run.data.seq_length
    if tokens % (rows * shards):
        step = rows * shards
        length = next(n for n in range(run.data.seq_length, run.data.seq_length + step + 1)
                      if n * run.training.micro_batch_size % step == 0 and n % shards == 0)  # fmt: skip
        yield (
            f"--fp8-recipe {run.precision.fp8_recipe}: --micro-batch-size {run.training.micro_batch_size} x "
            f"--seq-length {run.data.seq_length} = {tokens} tokens must be a multiple of {rows} on each of "
            f"the {shards} ranks that share the sequence: --seq-length {length}"
        )


def graphs_are_possible(run: RunConfig, typed: Typed) -> Problems:
    if run.graphs.cuda_graph_impl == "none":
        return
    if run.graphs.cuda_graph_impl == "transformer_engine":
        yield (
            "--cuda-graph-impl transformer_engine needs a training loop that captures; "
            "use --cuda-graph-impl local, which captures each layer at its first steps"
        )
    if run.process.device == "cpu":
        yield "--cuda-graph-impl needs a GPU"
    if run.recompute.recompute_granularity is not None:
        yield "--cuda-graph-impl does not go with recomputation (--recompute-granularity)"


RULES = (
    engine_is_there,
    engine_features,
    documents_are_whole_and_counted_anew,
    packed_documents_have_a_kernel,
    context_is_exchanged_in_one_way,
    eight_bit_formats_agree,
    recipe_suits_the_machine,
    layers_in_bf16_are_possible,
    recomputed_norms_and_delayed_scaling,
    shapes_suit_fp8,
    graphs_are_possible,
)
