"""Batches, duration, exit, optimizer, schedule and precision."""

from argparse import ArgumentTypeError
from dataclasses import dataclass
from signal import Signals
from typing import Literal

from megatron_ext.config.flags import flag


def signal_by_name(name: str) -> Signals:
    """``SIGTERM`` -> signal.SIGTERM."""
    if name not in Signals.__members__:
        raise ArgumentTypeError(f"{name!r} is not a signal of this system, such as SIGTERM or SIGUSR1")
    return Signals[name]


@dataclass
class TrainingArguments:
    """Batches, duration and exit."""

    micro_batch_size: int | None = None
    """Sequences in one forward pass of one data parallel rank."""

    global_batch_size: int | None = None
    """Sequences in one optimizer step; by default --micro-batch-size times the data parallel size."""

    rampup_batch_size: list[int] | None = flag(None, nargs=3, metavar=("START", "INCREMENT", "SAMPLES"))
    """Grow the global batch from START by INCREMENT until --global-batch-size, over SAMPLES samples;
    for runs in samples (--train-samples)."""

    decrease_batch_size_if_needed: bool = False
    """Round a global batch that micro batch times data parallel size does not divide down."""

    train_iters: int | None = None
    """Optimizer steps of the whole run; this or --train-samples."""

    train_samples: int | None = None
    """Sequences of the whole run; this or --train-iters."""

    exit_interval: int | None = None
    """Stop after an iteration that this divides."""

    exit_duration_in_mins: int | None = None
    """Save and stop after this many minutes."""

    exit_signal_handler: bool = False
    """Save and stop when --exit-signal arrives; always so here."""

    exit_signal: Signals = flag(Signals.SIGTERM, type=signal_by_name, metavar="NAME")
    """One more signal that asks for a checkpoint and an exit; SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1
    always do."""

    iterations_to_skip: list[int] = flag([])
    """Iterations, numbered as in the log (Megatron-LM 0.16 numbers from 0), whose batch is not trained on."""

    manual_gc: bool = False
    """Collect garbage at fixed iterations, so that all ranks pause together."""

    manual_gc_interval: int = 0
    """Iterations between two collections under --manual-gc; 0 never collects."""

    manual_gc_eval: bool = True
    """Do not collect garbage around validation under --manual-gc."""

    empty_unused_memory_level: Literal[0, 1, 2] = 0
    """Give cached GPU memory back: 0 never, 1 before each update and after a validation, 2 after the update
    too."""

    check_for_nan_in_loss_and_grad: bool = flag(True, "--no-check-for-nan-in-loss-and-grad")
    """Do not stop at a NaN or Inf in the loss or a gradient."""

    skip_bad_iterations: int = 0
    """Pass over this many iterations of a run with a NaN or Inf in the loss or a gradient, without an
    update and with their samples noted in bad_samples.jsonl in the --save folder; the next one stops it."""

    check_for_large_grads: bool = False
    """Stop at a gradient of unexpected size."""

    calculate_per_token_loss: bool = False
    """Average the loss over the tokens of the global batch instead of over its micro batches."""


@dataclass
class OptimizerArguments:
    """Optimizer and regularization."""

    optimizer: Literal["adam", "sgd", "muon", "dist_muon"] = "adam"
    """Optimizer; adam is AdamW."""

    weight_decay: float = 0.01
    """Weight decay of matrices; norms and biases have none."""

    start_weight_decay: float | None = None
    """Weight decay at the start, where --weight-decay-incr-style is not constant."""

    end_weight_decay: float | None = None
    """Weight decay at the end, where --weight-decay-incr-style is not constant."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight decay moves from start to end."""

    clip_grad: float = 1.0
    """Clip gradients to this global norm; 0 does not."""

    adam_beta1: float = 0.9
    """Decay of the mean of gradients."""

    adam_beta2: float = 0.999
    """Decay of the mean of squared gradients."""

    adam_eps: float = 1e-08
    """Term that keeps Adam's denominator from zero."""

    sgd_momentum: float = 0.9
    """Momentum of sgd."""


@dataclass
class ScheduleArguments:
    """Learning rate over the run."""

    lr: float | None = None
    """The highest learning rate."""

    min_lr: float = 0.0
    """The learning rate never falls below this after the warm-up."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """How the learning rate falls; WSD stays and falls at the end (warm-up, stable, decay)."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """How WSD's last part falls."""

    lr_decay_iters: int | None = None
    """Iterations until --min-lr; by default --train-iters."""

    lr_decay_samples: int | None = None
    """Samples until --min-lr; by default --train-samples."""

    lr_wsd_decay_iters: int | None = None
    """Iterations of WSD's last part."""

    lr_wsd_decay_samples: int | None = None
    """Samples of WSD's last part."""

    lr_warmup_fraction: float | None = None
    """Share of the decay's length that is warm-up."""

    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""

    lr_warmup_samples: int = 0
    """Samples of linear warm-up."""

    lr_warmup_init: float = 0.0
    """Learning rate that the warm-up starts from."""

    override_opt_param_scheduler: bool = flag(
        False, "--override-opt_param-scheduler", "--override-opt-param-scheduler"
    )
    """Take the schedule from these flags, not from the checkpoint."""

    use_checkpoint_opt_param_scheduler: bool = flag(
        False, "--use-checkpoint-opt_param-scheduler", "--use-checkpoint-opt-param-scheduler"
    )
    """Take the schedule from the checkpoint, not from these flags."""


@dataclass
class PrecisionArguments:
    """Number formats; without a flag everything is fp32."""

    bf16: bool = False
    """Weights and activations in bfloat16, main weights and sums in fp32."""

    fp16: bool = False
    """Weights and activations in float16 with loss scaling; on a GPU."""

    loss_scale: float | None = None
    """Fixed loss scale of --fp16; by default it adapts."""

    initial_loss_scale: float = 2**32
    """First value of the adapting loss scale."""

    min_loss_scale: float = 1.0
    """Lowest value of the adapting loss scale."""

    loss_scale_window: float = 1000
    """Steps without overflow after which the loss scale doubles."""

    hysteresis: int = 2
    """Overflows after which the loss scale halves."""


FP8_FIELDS = (
    "fp32_residual_connection",
    "fp8",
    "fp8_recipe",
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    "fp4",
    "fp4_recipe",
)


@dataclass
class Fp8Arguments:
    """FP8 through Transformer Engine."""

    fp8_param_gather: bool = False
    """Keep the parameters in FP8 and gather them so; needs the distributed optimizer."""


@dataclass
class RandomArguments:
    """Random numbers."""

    seed: int = 1234
    """Seed of initial weights, data order and dropout."""

    data_parallel_random_init: bool = False
    """Other random numbers on each data parallel rank; the initial weights stay the same."""
