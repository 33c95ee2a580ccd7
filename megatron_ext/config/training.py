"""Batches, duration, exit, optimizer and schedule."""

from argparse import ArgumentTypeError
from dataclasses import dataclass
from signal import Signals
from typing import Literal

from megatron_ext.common.flags import derived, flag
from megatron_ext.config.needs import ADAM, CHECKED, GPU, LOAD, MANUAL_GC, MUON, SGD, WSD


def signal_by_name(name: str) -> Signals:
    """``SIGTERM`` -> signal.SIGTERM."""
    if name not in Signals.__members__:
        raise ArgumentTypeError(f"{name!r} is not a signal of this system, such as SIGTERM or SIGUSR1")
    return Signals[name]


@dataclass(kw_only=True)
class TrainingConfig:
    """Batches, duration and exit."""

    micro_batch_size: int = flag(0, default=None, minimum=1)
    """Sequences per forward pass on each data parallel rank."""

    global_batch_size: int = flag(0, default=None, minimum=1)
    """Sequences per optimizer step; by default --micro-batch-size times the data parallel size."""

    rampup_batch_size: list[int] | None = flag(None, nargs=3, metavar=("START", "INCREMENT", "SAMPLES"))
    """Increase the global batch size from START in steps of INCREMENT to --global-batch-size, over SAMPLES
    samples; for runs in samples (--train-samples)."""

    decrease_batch_size_if_needed: bool = False
    """Round the global batch size down to a multiple of micro batch size times data parallel size."""

    train_iters: int = flag(0, default=None, minimum=1)
    """Number of optimizer steps of the whole run; give this or --train-samples."""

    train_samples: int | None = flag(None, minimum=1)
    """Number of sequences of the whole run; give this or --train-iters."""

    exit_interval: int | None = flag(None, minimum=1)
    """Save and stop after an iteration divisible by this."""

    exit_duration_in_mins: int | None = flag(None, minimum=1)
    """Save and stop after this many minutes."""

    exit_signal_handler: bool = False
    """Save and stop on --exit-signal; always on here."""

    exit_signal: Signals = flag(Signals.SIGTERM, type=signal_by_name, metavar="NAME")
    """A further signal that saves a checkpoint and stops the run; SIGTERM, SIGINT (Ctrl-C), SIGHUP and
    SIGUSR1 always do."""

    iterations_to_skip: list[int] = flag([])
    """Iterations whose batch is skipped, numbered as in the log (Megatron-LM 0.16 numbers from 0)."""

    manual_gc: bool = False
    """Collect garbage at fixed iterations, so that all ranks pause together."""

    manual_gc_interval: int = flag(0, minimum=0, needs=[MANUAL_GC])
    """Iterations between two garbage collections with --manual-gc; 0 never collects."""

    manual_gc_eval: bool = flag(True, needs=[MANUAL_GC])
    """Do not collect garbage before validation with --manual-gc."""

    empty_unused_memory_level: Literal[0, 1, 2] = flag(0, needs=[GPU])
    """Release cached GPU memory: 0 never, 1 before each update and after a validation, 2 also after each
    update."""

    check_for_nan_in_loss_and_grad: bool = flag(True, "--no-check-for-nan-in-loss-and-grad")
    """Do not check the loss and the gradients for NaN or Inf."""

    skip_bad_iterations: int = flag(0, minimum=0, needs=[CHECKED])
    """Skip the update in up to this many iterations with a NaN or Inf in the loss or a gradient, and write
    their samples to bad_samples.jsonl in the --save folder; the next such iteration ends the run."""

    check_for_large_grads: bool = False
    """Stop at a gradient of unexpected size."""

    grad_norm_skip_threshold: float | None = flag(None, above=0)
    """Skip the update of an iteration whose gradient norm, before clipping, is above this: parameters and
    optimizer state stay as they are, and the log counts it as skipped."""

    calculate_per_token_loss: bool = False
    """Average the loss over the tokens of the global batch instead of over its micro batches."""

    consumed_train_samples: int = derived(0)
    consumed_valid_samples: int = derived(0)
    skipped_train_samples: int = derived(0)
    variable_seq_lengths: bool = derived(False)


@dataclass(kw_only=True)
class OptimizerConfig:
    """Optimizer and regularization."""

    optimizer: Literal["adam", "sgd", "muon", "dist_muon"] = "adam"
    """Optimizer; adam is AdamW. muon is for hidden matrices and leaves the others to AdamW; dist_muon
    shares its state and work among data parallel ranks."""

    weight_decay: float = flag(0.01, minimum=0)
    """Weight decay of matrices; norms and biases have none."""

    decay_embeddings: bool = flag(True, "--no-embedding-weight-decay")
    """No weight decay of the embeddings, nor of an output layer that is tied to them."""

    start_weight_decay: float | None = flag(None, minimum=0)
    """Weight decay at the start, if --weight-decay-incr-style is not constant."""

    end_weight_decay: float | None = flag(None, minimum=0)
    """Weight decay at the end, if --weight-decay-incr-style is not constant."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight decay changes from start to end."""

    clip_grad: float = flag(1.0, minimum=0)
    """Clip gradients to this global norm; 0 disables clipping."""

    z_loss_coeff: float = flag(0.0, minimum=0)
    """Coefficient c of the auxiliary loss c z^2 per token, z the log of the softmax's denominator; it keeps
    logits from drifting (PaLM: 1e-4). The lm loss that is reported is without it."""

    adam_beta1: float = flag(0.9, minimum=0, below=1, needs=[ADAM])
    """Decay rate of Adam's mean of gradients."""

    adam_beta2: float = flag(0.999, minimum=0, below=1, needs=[ADAM])
    """Decay rate of Adam's mean of squared gradients."""

    adam_eps: float = flag(1e-08, above=0, needs=[ADAM])
    """Term added to Adam's denominator, for numerical stability."""

    sgd_momentum: float = flag(0.9, minimum=0, below=1, needs=[SGD])
    """Momentum of --optimizer sgd."""

    muon_momentum: float = flag(0.9, minimum=0, below=1, needs=[MUON])
    """Momentum of muon."""

    muon_use_nesterov: bool = flag(False, needs=[MUON])
    """Take muon's momentum a step ahead, as its authors do."""

    muon_split_qkv: bool = flag(True, "--muon-no-split-qkv", needs=[MUON])
    """Orthogonalize the joint projection of query, key and value as one matrix, not as three."""

    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = flag("spectral", needs=[MUON])
    """Factor of muon's updates by the shape of the matrix: sqrt(max(rows, columns)), sqrt(rows / columns),
    or sqrt(max(1, rows / columns))."""

    muon_extra_scale_factor: float = flag(1.0, above=0, needs=[MUON])
    """One more factor of muon's updates; with spectral, 0.2 makes them as large as AdamW's."""

    muon_num_ns_steps: int = flag(5, minimum=1, maximum=99, needs=[MUON])
    """Newton-Schulz iterations of muon."""

    muon_tp_mode: Literal["blockwise", "duplicated", "distributed"] = flag(
        "duplicated", refused=["distributed"], needs=[MUON]
    )
    """What muon orthogonalizes under tensor parallelism: the whole matrix on every rank (duplicated), so that
    no update depends on the layout, or each rank's shard by itself (blockwise, Megatron-LM's default)."""

    @property
    def is_muon(self) -> bool:
        return self.optimizer in ("muon", "dist_muon")


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate and weight decay over the run."""

    lr: float = flag(0.0, default=None, minimum=0)
    """Maximum learning rate."""

    min_lr: float = flag(0.0, minimum=0)
    """Minimum learning rate after the warm-up."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """How the learning rate decays; WSD is constant and decays at the end (warm-up, stable, decay)."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = flag(
        "exponential", needs=[WSD]
    )
    """How the learning rate decays in the last part of WSD."""

    lr_decay_iters: int | None = flag(None, minimum=1)
    """Iterations until the learning rate is --min-lr; by default --train-iters."""

    lr_decay_samples: int | None = flag(None, minimum=1)
    """Samples until the learning rate is --min-lr; by default --train-samples."""

    lr_wsd_decay_iters: int | None = flag(None, minimum=1, needs=[WSD])
    """Iterations of WSD's decay."""

    lr_wsd_decay_samples: int | None = flag(None, minimum=1, needs=[WSD])
    """Samples of WSD's decay."""

    lr_warmup_fraction: float | None = flag(None, minimum=0, maximum=1)
    """Length of the warm-up as a fraction of --lr-decay-iters (or --lr-decay-samples)."""

    lr_warmup_iters: int = flag(0, minimum=0)
    """Iterations of linear warm-up."""

    lr_warmup_samples: int = flag(0, minimum=0)
    """Samples of linear warm-up."""

    lr_warmup_init: float = flag(0.0, minimum=0)
    """Learning rate at the start of the warm-up."""

    override_opt_param_scheduler: bool = flag(
        False, "--override-opt_param-scheduler", "--override-opt-param-scheduler", needs=[LOAD]
    )
    """Use the schedule of the flags instead of the checkpoint's."""

    use_checkpoint_opt_param_scheduler: bool = flag(
        False, "--use-checkpoint-opt_param-scheduler", "--use-checkpoint-opt-param-scheduler", needs=[LOAD]
    )
    """Use the schedule of the checkpoint instead of the flags'."""

    lr_warmup_steps: float = derived(0)
    lr_decay_steps: int = derived(0)
    wd_incr_steps: int = derived(0)
    wsd_decay_steps: int | None = derived(None)
