"""Values derived from other flags, as in Megatron-LM's validate_args and training loop."""

import os

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.config.parallel import ProcessConfig
from megatron_ext.platform import engine, environment

LEGACY_SPLIT = "969, 30, 1"


def from_environment(process: ProcessConfig, world_size: int | None) -> None:
    """Set world_size, rank and local_rank from torchrun's environment variables."""
    process.world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    process.rank = int(os.environ.get("RANK", 0))
    if process.local_rank is None:
        process.local_rank = int(os.environ.get("LOCAL_RANK", 0))


def device(run: RunConfig, assumed: platform.Device | None) -> list[str]:
    """Choose the device, cpu or cuda, the backend and the layers; returns problems."""
    process = run.process
    if assumed is not None:
        process.device = assumed
        process.engine_problem = None if assumed == "cuda" else "it needs a GPU"
    else:
        try:
            split = run.parallel.tensor_model_parallel_size > 1 or run.parallel.context_parallel_size > 1
            variables = environment.settings(split, run.layers.deterministic_mode)
            process.device = platform.activate(process.device, variables)
        except platform.PlatformError as error:
            return [str(error)]
        process.engine_problem = engine.problem(process.device == "cuda")
        if process.engine_problem is None:
            process.gpu = engine.gpu()
    process.has_transformer_engine = process.engine_problem is None
    if process.distributed_backend is None:
        process.distributed_backend = "nccl" if process.device == "cuda" else "gloo"
    if run.layers.transformer_impl is None:
        run.layers.transformer_impl = "local" if process.engine_problem else "transformer_engine"
    return []


def before_rules(run: RunConfig) -> list[str]:
    """Set values that other flags imply; returns warnings.

    Must not fail on a wrong value: the rules report those.
    """
    warnings = []
    if run.layers.use_rotary_position_embeddings:
        run.change_model(position_embedding_type="rope")
    if run.recompute.recompute_activations:
        run.recompute.recompute_granularity = "selective"
    if run.parallel.tensor_model_parallel_size == 1 and run.parallel.sequence_parallel:
        run.parallel.sequence_parallel = False
        warnings.append("--sequence-parallel is off because --tensor-model-parallel-size is 1")
    if run.data.is_split and run.data.split is None:
        run.data.split = LEGACY_SPLIT
        flag = "--data-stages" if run.data.data_stages else "--data-path"
        warnings.append(f"{flag} without --split: taking Megatron-LM's default {LEGACY_SPLIT!r}")
    if run.data.dataloader_type is None:
        run.data.dataloader_type = "single"
    fusion, model = run.fusion, run.model
    fusion.bias_gelu_fusion = fusion.bias_gelu_fusion and model.add_bias_linear
    fusion.apply_rope_fusion = fusion.apply_rope_fusion and model.position_embedding_type == "rope"
    _layout(run)
    _precision(run, warnings)
    if run.optimizer.weight_decay_incr_style == "constant":
        run.optimizer.start_weight_decay = run.optimizer.end_weight_decay = run.optimizer.weight_decay
    return warnings


def pipeline_layers(run: RunConfig) -> int:
    """Number of layers to divide among stages, including embedding and loss if they count as layers."""
    return (
        (run.model.num_layers or 0)
        + run.parallel.account_for_embedding_in_pipeline_split
        + run.parallel.account_for_loss_in_pipeline_split
    )


def _layout(run: RunConfig) -> None:
    run.parallel.data_parallel_size = max(
        1, run.process.world_size // max(1, run.parallel.model_parallel_size)
    )
    if run.training.global_batch_size is None and run.training.micro_batch_size:
        run.training.global_batch_size = run.samples_at_once
    stages = run.parallel.num_virtual_stages_per_pipeline_rank
    if run.parallel.num_layers_per_virtual_pipeline_stage:
        on_rank = pipeline_layers(run) // max(1, run.parallel.pipeline_model_parallel_size)
        stages = on_rank // run.parallel.num_layers_per_virtual_pipeline_stage
    run.parallel.virtual_pipeline_model_parallel_size = stages if stages and stages > 1 else None
    if run.parallel.virtual_pipeline_model_parallel_size is None:
        # Only the interleaved schedule can overlap sends, or align the gathering of parameters.
        run.parallel.overlap_p2p_comm = run.parallel.align_param_gather = False


def _precision(run: RunConfig, warnings: list[str]) -> None:
    if run.precision.bf16:
        # Summing many small bf16 numbers loses most of them, so main gradients stay in fp32.
        run.parallel.accumulate_allreduce_grads_in_fp32 = not run.parallel.grad_reduce_in_bf16
    if run.precision.fp16 and not run.precision.loss_scale:
        # An Inf then makes the loss scaler reduce its scale.
        if run.training.check_for_nan_in_loss_and_grad:
            warnings.append("--fp16 with an adapting loss scale: NaN in loss and gradients is not an error")
        run.training.check_for_nan_in_loss_and_grad = False


def after_rules(run: RunConfig) -> None:
    """Set values that need a consistent command line: dtype, iterations and the schedule's steps."""
    import torch

    run.precision.params_dtype = (
        torch.float16 if run.precision.fp16 else torch.bfloat16 if run.precision.bf16 else torch.float32
    )
    run.training.variable_seq_lengths = False
    if run.rounds.round_index is not None and run.rounds.round_schedule == "continue":
        # Its length grows with the rounds: the position is from the checkpoint, the shape from this run.
        run.schedule.override_opt_param_scheduler = True
    run.training.consumed_train_samples = run.training.consumed_valid_samples = (
        run.training.skipped_train_samples
    ) = 0
    if run.training.train_samples is not None:
        run.training.train_iters = iterations_left(run)
        _schedule_in_samples(run, run.training.train_samples)
    elif run.training.train_iters is not None:
        _schedule_in_iterations(run)


def iterations_left(run: RunConfig, consumed: int = 0) -> int:
    """Optimizer steps from ``consumed`` samples to --train-samples, including batch size ramp-up."""
    ramp, iterations = run.training.rampup_batch_size, 0
    samples = run.training.train_samples or 0
    while ramp and consumed <= ramp[2] and consumed < samples:
        consumed += running_batch(run, consumed)
        iterations += 1
    return iterations + max(0, samples - consumed) // running_batch(run)


def running_batch(run: RunConfig, consumed: int | None = None) -> int:
    """Samples of a step after ``consumed`` samples, by default after ramp-up.

    Rounded down to whole micro batches of all ranks with --decrease-batch-size-if-needed.
    """
    ramp = run.training.rampup_batch_size
    batch = (
        batch_at(consumed, run.training.global_batch_size, ramp)
        if consumed is not None
        else run.training.global_batch_size
    )
    if not run.training.decrease_batch_size_if_needed:
        return batch
    unit = run.samples_at_once
    return max(batch // unit, 1) * unit


def batch_at(consumed: int, global_batch: int, rampup: list[int] | None) -> int:
    """The global batch size after ``consumed`` samples, as in Megatron-Core's microbatch calculator."""
    if not rampup or consumed > rampup[2]:
        return global_batch
    start, increment, samples = rampup
    steps = (global_batch - start) // increment
    taken = int(consumed / (samples / steps)) if steps else 0
    return min(start + taken * increment, global_batch)


def _schedule_in_iterations(run: RunConfig) -> None:
    batch = running_batch(run)
    run.schedule.lr_decay_iters = run.schedule.lr_decay_iters or run.training.train_iters
    run.schedule.lr_decay_steps = run.schedule.lr_decay_iters * batch
    run.schedule.wd_incr_steps = run.training.train_iters * batch
    run.schedule.wsd_decay_steps = (
        None if run.schedule.lr_wsd_decay_iters is None else run.schedule.lr_wsd_decay_iters * batch
    )
    run.schedule.lr_warmup_steps = _warmup(run, run.schedule.lr_warmup_iters * batch)


def _schedule_in_samples(run: RunConfig, samples: int) -> None:
    run.schedule.lr_decay_steps = run.schedule.lr_decay_samples = run.schedule.lr_decay_samples or samples
    run.schedule.wd_incr_steps = samples
    run.schedule.wsd_decay_steps = run.schedule.lr_wsd_decay_samples
    run.schedule.lr_warmup_steps = _warmup(run, run.schedule.lr_warmup_samples)


def _warmup(run: RunConfig, steps: int) -> float:
    return (
        steps
        if run.schedule.lr_warmup_fraction is None
        else run.schedule.lr_warmup_fraction * run.schedule.lr_decay_steps
    )
