"""What follows from other flags, as Megatron-LM's validate_args and training loop work it out."""

import os
from argparse import Namespace

from megatron_ext import platform
from megatron_ext.platform import engine, environment

LEGACY_SPLIT = "969, 30, 1"


def from_environment(args: Namespace, world_size: int | None) -> None:
    """Set world_size, rank and local_rank from what torchrun put in the environment."""
    args.world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    args.rank = int(os.environ.get("RANK", 0))
    if args.local_rank is None:
        args.local_rank = int(os.environ.get("LOCAL_RANK", 0))


def device(args: Namespace, assumed: str | None) -> list[str]:
    """Settle ``args.device`` as cpu or cuda, the backend and the layers; returns problems."""
    found = []
    args.engine_problem = args.gpu = None
    if assumed is not None:
        args.device = assumed
        args.engine_problem = None if assumed == "cuda" else "it needs a GPU"
    else:
        try:
            split = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
            args.device = platform.activate(args.device, environment.settings(split, args.deterministic_mode))
        except platform.PlatformError as error:
            return [str(error)]
        args.engine_problem = engine.problem(args.device == "cuda")
        if args.engine_problem is None:
            args.gpu = engine.gpu()
    args.has_transformer_engine = args.engine_problem is None
    if args.distributed_backend is None:
        args.distributed_backend = "nccl" if args.device == "cuda" else "gloo"
    if args.transformer_impl is None:
        args.transformer_impl = "local" if args.engine_problem else "transformer_engine"
    return found


def before_rules(args: Namespace) -> list[str]:
    """Fill in what one flag says for another; returns warnings.

    Nothing here may fail on a wrong value: the rules report those.
    """
    warnings = []
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    if args.recompute_activations:
        args.recompute_granularity = "selective"
    if args.tensor_model_parallel_size == 1 and args.sequence_parallel:
        args.sequence_parallel = False
        warnings.append("--sequence-parallel is off because --tensor-model-parallel-size is 1")
    if (args.data_path is not None or args.data_args_path is not None) and args.split is None:
        args.split = LEGACY_SPLIT
        warnings.append(f"--data-path without --split: taking Megatron-LM's default {LEGACY_SPLIT!r}")
    if args.dataloader_type is None:
        args.dataloader_type = "single"
    model_shape(args)
    _layout(args)
    _precision(args, warnings)
    if args.weight_decay_incr_style == "constant":
        args.start_weight_decay = args.end_weight_decay = args.weight_decay
    return warnings


def model_shape(args: Namespace) -> Namespace:
    """Fill in the sizes and switches of the model that follow from others; returns ``args``."""
    hidden, heads = args.hidden_size, args.num_attention_heads
    if args.ffn_hidden_size is None and hidden:
        # A gated FFN has three matrices for two: 8h/3 keeps the parameters, in multiples of 64.
        args.ffn_hidden_size = int((4 * hidden * 2 / 3) / 64) * 64 if args.swiglu else 4 * hidden
    if args.kv_channels is None and hidden and heads and hidden % heads == 0:
        args.kv_channels = hidden // heads
    args.bias_gelu_fusion = args.bias_gelu_fusion and args.add_bias_linear
    args.add_qkv_bias = args.add_qkv_bias or args.add_bias_linear
    args.apply_rope_fusion = args.apply_rope_fusion and args.position_embedding_type == "rope"
    return args


def model_parallel_size(args: Namespace) -> int:
    """Processes that hold one copy of the model."""
    return args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size


def pipeline_layers(args: Namespace) -> int:
    """Layers that the pipeline divides, with the embedding and the loss where they count as one."""
    return (
        (args.num_layers or 0)
        + args.account_for_embedding_in_pipeline_split
        + args.account_for_loss_in_pipeline_split
    )


def _layout(args: Namespace) -> None:
    args.data_parallel_size = max(1, args.world_size // max(1, model_parallel_size(args)))
    if args.global_batch_size is None and args.micro_batch_size:
        args.global_batch_size = args.micro_batch_size * args.data_parallel_size
    stages = args.num_virtual_stages_per_pipeline_rank
    if args.num_layers_per_virtual_pipeline_stage:
        on_rank = pipeline_layers(args) // max(1, args.pipeline_model_parallel_size)
        stages = on_rank // args.num_layers_per_virtual_pipeline_stage
    args.virtual_pipeline_model_parallel_size = stages if stages and stages > 1 else None
    if args.virtual_pipeline_model_parallel_size is None:
        # Only the interleaved schedule can overlap sends, or align what the stages gather.
        args.overlap_p2p_comm = args.align_param_gather = False


def _precision(args: Namespace, warnings: list[str]) -> None:
    if args.bf16:
        # Sums of many small bf16 numbers lose most of them, so main gradients stay in fp32.
        args.accumulate_allreduce_grads_in_fp32 = not args.grad_reduce_in_bf16
    if args.fp16 and not args.loss_scale:
        # An Inf is then the loss scaler's signal to take a smaller scale.
        if args.check_for_nan_in_loss_and_grad:
            warnings.append("--fp16 with an adapting loss scale: NaN in loss and gradients is not an error")
        args.check_for_nan_in_loss_and_grad = False


def after_rules(args: Namespace) -> None:
    """Fill in what only a consistent command line has: dtype, iterations and the schedule's steps."""
    import torch

    args.params_dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
    args.variable_seq_lengths = False
    if args.round_index is not None and args.round_schedule == "continue":
        # Its length grows with the rounds: the position is the checkpoint's, the shape this run's.
        args.override_opt_param_scheduler = True
    args.consumed_train_samples = args.consumed_valid_samples = args.skipped_train_samples = 0
    if args.train_samples is not None:
        args.train_iters = iterations_left(args)
        _schedule_in_samples(args)
    elif args.train_iters is not None:
        _schedule_in_iterations(args)


def iterations_left(args: Namespace, consumed: int = 0) -> int:
    """Optimizer steps from ``consumed`` samples to --train-samples, through the batches of a ramp-up."""
    ramp, iterations = args.rampup_batch_size, 0
    while ramp and consumed <= ramp[2] and consumed < args.train_samples:
        consumed += running_batch(args, consumed)
        iterations += 1
    return iterations + max(0, args.train_samples - consumed) // running_batch(args)


def running_batch(args: Namespace, consumed: int | None = None) -> int:
    """Samples of a step after ``consumed`` samples, by default of a full one.

    Rounded down to whole micro batches of all ranks, where --decrease-batch-size-if-needed allows it.
    """
    ramp = getattr(args, "rampup_batch_size", None)
    batch = (
        batch_at(consumed, args.global_batch_size, ramp) if consumed is not None else args.global_batch_size
    )
    if not getattr(args, "decrease_batch_size_if_needed", False):
        return batch
    unit = args.micro_batch_size * args.data_parallel_size
    return max(batch // unit, 1) * unit


def batch_at(consumed: int, global_batch: int, rampup: list[int] | None) -> int:
    """The global batch after ``consumed`` samples, as Megatron-Core's microbatch calculator grows it."""
    if not rampup or consumed > rampup[2]:
        return global_batch
    start, increment, samples = rampup
    steps = (global_batch - start) // increment
    taken = int(consumed / (samples / steps)) if steps else 0
    return min(start + taken * increment, global_batch)


def _schedule_in_iterations(args: Namespace) -> None:
    batch = running_batch(args)
    args.lr_decay_iters = args.lr_decay_iters or args.train_iters
    args.lr_decay_steps = args.lr_decay_iters * batch
    args.wd_incr_steps = args.train_iters * batch
    args.wsd_decay_steps = None if args.lr_wsd_decay_iters is None else args.lr_wsd_decay_iters * batch
    args.lr_warmup_steps = _warmup(args, args.lr_warmup_iters * batch)


def _schedule_in_samples(args: Namespace) -> None:
    args.lr_decay_samples = args.lr_decay_samples or args.train_samples
    args.lr_decay_steps = args.lr_decay_samples
    args.wd_incr_steps = args.train_samples
    args.wsd_decay_steps = args.lr_wsd_decay_samples
    args.lr_warmup_steps = _warmup(args, args.lr_warmup_samples)


def _warmup(args: Namespace, steps: int) -> float:
    return steps if args.lr_warmup_fraction is None else args.lr_warmup_fraction * args.lr_decay_steps
