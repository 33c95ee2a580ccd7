"""Rules of the parallel layout."""

from megatron_ext.arguments.defaults import pipeline_layers
from megatron_ext.arguments.validate.rule import Problems, Typed
from megatron_ext.config import RunConfig


def world_is_divisible(run: RunConfig, typed: Typed) -> Problems:
    size = run.parallel.model_parallel_size
    if run.process.world_size % size:
        yield (
            f"the {run.process.world_size} processes cannot be divided into models of {size}: "
            f"--tensor-model-parallel-size {run.parallel.tensor_model_parallel_size} x "
            f"--pipeline-model-parallel-size {run.parallel.pipeline_model_parallel_size} x "
            f"--context-parallel-size {run.parallel.context_parallel_size} must divide "
            "torchrun's --nproc-per-node x --nnodes"
        )


def heads_are_divisible(run: RunConfig, typed: Typed) -> Problems:
    parallel, heads = run.parallel.tensor_model_parallel_size, run.model.num_attention_heads
    if heads % parallel:
        yield f"--num-attention-heads {heads} is not divisible by --tensor-model-parallel-size {parallel}"
    groups = run.model.query_groups
    if groups != heads and groups % parallel and parallel % groups:
        yield (
            f"--num-query-groups {groups} must be a multiple or a divisor of "
            f"--tensor-model-parallel-size {parallel}"
        )


def norms_across_heads_have_them(run: RunConfig, typed: Typed) -> Problems:
    """A rank that shares a query group with others would count its keys more than once."""
    parallel, groups = run.parallel.tensor_model_parallel_size, run.model.query_groups
    if run.model.qk_layernorm and run.model.qk_layernorm_across_heads and groups < parallel:
        yield (
            f"--qk-layernorm-across-heads needs as many query groups ({groups}) as "
            f"--tensor-model-parallel-size {parallel}, or more"
        )


def windows_see_the_sequence(run: RunConfig, typed: Typed) -> Problems:
    if run.model.window_size is not None and run.parallel.context_parallel_size > 1:
        yield "--window-size does not go with --context-parallel-size above 1, which divides the sequence"


def widths_are_divisible(run: RunConfig, typed: Typed) -> Problems:
    parallel = run.parallel.tensor_model_parallel_size
    if run.model.ffn_hidden_size % parallel:
        origin = "" if "ffn_hidden_size" in typed else " (derived)"
        yield (
            f"--ffn-hidden-size {run.model.ffn_hidden_size}{origin} is not divisible by "
            f"--tensor-model-parallel-size {parallel}"
        )
    if run.model.padded_vocab_size is not None and run.model.padded_vocab_size % parallel:
        yield (
            f"--padded-vocab-size {run.model.padded_vocab_size} is not divisible by "
            f"--tensor-model-parallel-size {parallel}"
        )


def sequence_is_divisible(run: RunConfig, typed: Typed) -> Problems:
    if run.parallel.sequence_parallel and run.data.seq_length % run.parallel.tensor_model_parallel_size:
        yield (
            f"--sequence-parallel: --seq-length {run.data.seq_length} is not divisible by "
            f"--tensor-model-parallel-size {run.parallel.tensor_model_parallel_size}"
        )
    if run.parallel.context_parallel_size > 1 and run.data.seq_length % (
        2 * run.parallel.context_parallel_size
    ):
        yield (
            f"--seq-length {run.data.seq_length} must be a multiple of 2 x --context-parallel-size "
            f"{run.parallel.context_parallel_size}"
        )


def experts_are_not_supported(run: RunConfig, typed: Typed) -> Problems:
    if run.parallel.expert_model_parallel_size > 1:
        yield "--expert-model-parallel-size above 1: the models here are dense, without experts"


def layers_are_divisible(run: RunConfig, typed: Typed) -> Problems:
    """Layers must be divisible by stages, without those of --decoder-first/last-pipeline-num-layers."""
    stages, layers = run.parallel.pipeline_model_parallel_size, pipeline_layers(run)
    given = (run.parallel.decoder_first_pipeline_num_layers, run.parallel.decoder_last_pipeline_num_layers)
    ends = [count for count in given if count is not None]
    if not ends:
        if layers % stages:
            yield (
                f"--num-layers {_counted(run)} is not divisible by --pipeline-model-parallel-size {stages}; "
                "use --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers for an "
                "uneven division"
            )
        return
    if layers != run.model.num_layers:
        yield (
            "--account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split exclude "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers"
        )
    inner, inner_stages = run.model.num_layers - sum(ends), stages - len(ends)
    if inner < 0 or bool(inner) != bool(inner_stages) or inner_stages > 0 and inner % inner_stages:
        yield (
            f"--num-layers {run.model.num_layers}: --decoder-first/last-pipeline-num-layers leave {inner} "
            f"layers for {max(0, inner_stages)} pipeline stages, which do not divide"
        )


def _counted(run: RunConfig) -> str:
    extra = pipeline_layers(run) - run.model.num_layers
    return f"{run.model.num_layers} (+{extra} for embedding and loss)" if extra else str(run.model.num_layers)


def virtual_stages_are_divisible(run: RunConfig, typed: Typed) -> Problems:
    per_stage, stages = (
        run.parallel.num_layers_per_virtual_pipeline_stage,
        run.parallel.num_virtual_stages_per_pipeline_rank,
    )
    if per_stage is None and stages is None:
        return
    if per_stage is not None and stages is not None:
        yield (
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank "
            "exclude each other"
        )
        return
    ends = (run.parallel.decoder_first_pipeline_num_layers, run.parallel.decoder_last_pipeline_num_layers)
    uneven = any(count is not None for count in ends)
    if per_stage is not None and uneven:
        yield "an uneven interleaved pipeline is given by --num-virtual-stages-per-pipeline-rank"
    on_rank = pipeline_layers(run) // run.parallel.pipeline_model_parallel_size
    if not uneven and on_rank % (per_stage or stages or 1):
        given = (
            "--num-layers-per-virtual-pipeline-stage"
            if per_stage
            else "--num-virtual-stages-per-pipeline-rank"
        )
        yield f"the {on_rank} layers of a pipeline rank are not divisible by {given} {per_stage or stages}"
    if uneven and any(count % stages for count in ends if count is not None and stages):
        yield f"the layers of the first and last stage must be divisible by {stages} virtual stages"


def interleaving_has_a_pipeline(run: RunConfig, typed: Typed) -> Problems:
    if run.parallel.virtual_pipeline_model_parallel_size is None:
        return
    stages = run.parallel.pipeline_model_parallel_size
    least = 2 if run.parallel.overlap_p2p_comm else 3
    if stages < least:
        without = "" if run.parallel.overlap_p2p_comm else " with --no-overlap-p2p-communication"
        yield f"the interleaved schedule{without} needs --pipeline-model-parallel-size {least} or more"
        return
    micro_batches = run.training.global_batch_size // (run.samples_at_once)
    group = run.parallel.microbatch_group_size_per_vp_stage or stages
    if not stages <= group <= max(stages, micro_batches) or micro_batches < stages:
        yield (
            f"the interleaved schedule takes micro batches in groups of {group}, which must be at least "
            f"--pipeline-model-parallel-size {stages} and at most the {micro_batches} of a step"
        )
    elif 0 < micro_batches % group < stages:
        yield (
            f"the {micro_batches} micro batches of a step must be a multiple of the {stages} pipeline stages "
            "in the interleaved schedule; change --global-batch-size or --micro-batch-size"
        )


def overlap_has_what_it_needs(run: RunConfig, typed: Typed) -> Problems:
    if run.parallel.overlap_param_gather and not run.parallel.use_distributed_optimizer:
        yield "--overlap-param-gather needs --use-distributed-optimizer"
    if run.parallel.overlap_param_gather and not run.parallel.overlap_grad_reduce:
        yield "--overlap-param-gather needs --overlap-grad-reduce"


def recomputation_is_complete(run: RunConfig, typed: Typed) -> Problems:
    if run.recompute.recompute_granularity == "full":
        missing = [
            name for name in ("method", "num_layers") if getattr(run.recompute, "recompute_" + name) is None
        ]
        for name in missing:
            yield f"--recompute-granularity full needs --recompute-{name.replace('_', '-')}"
    if run.recompute.recompute_activations and typed.get("recompute_granularity") == "full":
        yield "--recompute-activations means --recompute-granularity selective, but full was given too"
    on_rank = max(1, pipeline_layers(run) // run.parallel.pipeline_model_parallel_size)
    if (run.recompute.recompute_num_layers or 0) > on_rank:
        given = run.recompute.recompute_num_layers
        yield f"--recompute-num-layers {given} exceeds the {on_rank} layers of a rank"


def recomputed_modules_exist(run: RunConfig, typed: Typed) -> Problems:
    known = ("core_attn", "layernorm", "mlp")
    for name in run.recompute.recompute_modules or ():
        if name not in known:
            yield f"--recompute-modules {name}: choose from {', '.join(known)}"
    if "layernorm" in (run.recompute.recompute_modules or ()) and run.model.augmented_shortcuts:
        yield (
            "--recompute-modules layernorm discards the normed input that the augmented shortcut reads; "
            "use core_attn, mlp, or --recompute-granularity full"
        )
    if "layernorm" in (run.recompute.recompute_modules or ()) and run.model.norm_placement == "output":
        yield "--recompute-modules layernorm has no effect with --norm-placement output: no input is normed"


def backend_suits_the_device(run: RunConfig, typed: Typed) -> Problems:
    if run.process.distributed_backend == "nccl" and run.process.device == "cpu":
        yield "--distributed-backend nccl needs GPUs; leave the flag out, or use gloo"


RULES_OF_DIVISION = (
    world_is_divisible,
    heads_are_divisible,
    norms_across_heads_have_them,
    widths_are_divisible,
    layers_are_divisible,
)
RULES = (
    *RULES_OF_DIVISION,
    windows_see_the_sequence,
    sequence_is_divisible,
    experts_are_not_supported,
    virtual_stages_are_divisible,
    interleaving_has_a_pipeline,
    overlap_has_what_it_needs,
    recomputation_is_complete,
    recomputed_modules_exist,
    backend_suits_the_device,
)
