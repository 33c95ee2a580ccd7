"""The outputs of a run: checkpoints, logs and profiles."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.common.flags import flag
from megatron_ext.config.needs import (
    GPU,
    LOAD,
    MEMORY_HISTORY,
    PROFILE,
    PROFILE_OR_MEMORY,
    SAVE,
    SAVE_SHARDED,
    TENSORBOARD,
    WANDB,
)

_OTHER_STRICTNESS = (
    *("log_unexpected", "log_all", "raise_unexpected", "raise_all"),
    *("return_unexpected", "return_all", "ignore_all"),
)


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints, in Megatron's torch_dist format."""

    save: str | None = flag(None, metavar="FOLDER")
    """Folder to write checkpoints to; needs --save-interval."""

    save_interval: int | None = flag(
        None, "--save-interval", "--persistent-save-interval", minimum=1, needs=[SAVE]
    )
    """Iterations between two checkpoints; one is also written at the end of a run."""

    save_retain_interval: int | None = flag(None, minimum=1, needs=[SAVE])
    """Keep the checkpoints of iterations divisible by this, and the last one; remove the others."""

    keep_latest_k: int | None = flag(None, minimum=1, needs=[SAVE])
    """Keep this many of the newest checkpoints, and those of --save-retain-interval; remove the others."""

    no_save_optim: bool = flag(False, default=None, needs=[SAVE])
    """Do not save the optimizer's state."""

    no_save_rng: bool = flag(False, default=None, needs=[SAVE])
    """Do not save the state of the random number generators."""

    load: str | None = flag(None, metavar="FOLDER")
    """Resume from the last checkpoint in this folder."""

    no_load_optim: bool = flag(False, default=None, needs=[LOAD])
    """Do not load the optimizer's state."""

    no_load_rng: bool = flag(False, default=None, needs=[LOAD])
    """Do not load the state of the random number generators."""

    ckpt_step: int | None = flag(None, minimum=1, needs=[LOAD])
    """Load the checkpoint of this iteration instead of the last."""

    finetune: bool = flag(False, needs=[LOAD])
    """Load only the weights, and start at iteration 0 with a new optimizer, schedule and seed."""

    pretrained_checkpoint: str | None = flag(None, metavar="FOLDER", needs=[LOAD])
    """Start from this checkpoint's weights if --load holds no checkpoint yet."""

    exit_on_missing_checkpoint: bool = flag(False, needs=[LOAD])
    """Stop if --load holds no checkpoint, instead of starting from random weights."""

    ckpt_format: Literal["torch", "torch_dist", "torch_dcp", "fsdp_dtensor"] = flag(
        "torch_dist", refused=["torch", "torch_dcp", "fsdp_dtensor"]
    )
    """Format of checkpoints; torch_dist can be loaded at any parallel layout."""

    async_save: bool = flag(False, needs=[SAVE])
    """Write checkpoints while training goes on."""

    ckpt_fully_parallel_save: bool = flag(True, needs=[SAVE])
    """Let one data parallel rank write replicated shards, instead of dividing them among all."""

    distrib_optim_fully_reshardable_mem_efficient: bool = flag(False, needs=[SAVE_SHARDED])
    """Gather the distributed optimizer's state for a checkpoint on one data parallel rank, over gloo: slower,
    but the other ranks need no memory for it."""

    use_checkpoint_args: bool = False
    """Also take the tokenizer, the sequence length and the dropouts from the checkpoint in --load or, if
    there is none yet, in --pretrained-checkpoint; flags on the command line override it, a preset does
    not."""

    ckpt_fully_parallel_load: bool = False
    """Let each rank read only the shards that it needs; always on here."""

    auto_detect_ckpt_format: bool = False
    """Detect a checkpoint's format; no effect here, as only torch_dist is supported."""

    dist_ckpt_strictness: Literal[
        "assume_ok_unexpected",
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ] = flag("assume_ok_unexpected", refused=_OTHER_STRICTNESS)
    """What to do if a checkpoint and the model do not have the same parameters."""


@dataclass(kw_only=True)
class LoggingConfig:
    """The log line, TensorBoard and Weights & Biases."""

    log_interval: int = flag(100, minimum=1)
    """Iterations between two log lines."""

    log_throughput: bool = False
    """Add TFLOP/s per device to the log line."""

    log_params_norm: bool = False
    """Add the norm of the parameters to the log line."""

    log_num_zeros_in_grad: bool = False
    """Add the number of zeros in the gradient to the log line."""

    log_progress: bool = flag(False, needs=[SAVE])
    """Append job id, number of GPUs and each saved iteration to progress.txt in the --save folder."""

    timing_log_level: Literal[0, 1, 2] = 0
    """Detail of the timers: 0 for iterations, 1 for their larger parts, 2 also for the smaller ones."""

    timing_log_option: Literal["max", "minmax", "all"] = "minmax"
    """Times to report over the ranks: the maximum, minimum and maximum, or all."""

    barrier_with_L1_time: bool = flag(True, "--no-barrier-with-level-1-timing")
    """No barrier over all ranks before each timer of level 1."""

    metrics_file: str | None = flag(None, metavar="FILE")
    """Append a line with a JSON object for every iteration and validation to this file."""

    tensorboard_dir: str | None = flag(None, metavar="FOLDER")
    """Write TensorBoard events to this folder."""

    tensorboard_log_interval: int = flag(1, minimum=1, needs=[TENSORBOARD])
    """Iterations between two TensorBoard points."""

    tensorboard_queue_size: int = flag(1000, minimum=1, needs=[TENSORBOARD])
    """TensorBoard points to buffer before they are written."""

    log_timers_to_tensorboard: bool = flag(False, needs=[TENSORBOARD])
    """Also write the timers to TensorBoard."""

    log_loss_scale_to_tensorboard: bool = flag(True, needs=[TENSORBOARD])
    """Do not write the loss scale to TensorBoard."""

    log_validation_ppl_to_tensorboard: bool = flag(False, needs=[TENSORBOARD])
    """Also write the validation perplexity to TensorBoard."""

    log_memory_to_tensorboard: bool = flag(False, needs=[TENSORBOARD])
    """Also write the memory use to TensorBoard."""

    log_world_size_to_tensorboard: bool = flag(False, needs=[TENSORBOARD])
    """Also write the number of processes to TensorBoard."""

    wandb_project: str | None = None
    """Log to this project of Weights & Biases."""

    wandb_exp_name: str | None = flag(None, needs=[WANDB])
    """Name of the run in Weights & Biases."""

    wandb_save_dir: str | None = flag(None, metavar="FOLDER", needs=[WANDB])
    """Folder for Weights & Biases files."""

    wandb_entity: str | None = flag(None, needs=[WANDB])
    """Team or user in Weights & Biases."""


@dataclass(kw_only=True)
class ProfilingConfig:
    """Profiling of a range of iterations."""

    profile: bool = False
    """Profile the iterations from --profile-step-start to --profile-step-end."""

    profile_step_start: int = flag(10, minimum=0, needs=[PROFILE])
    """First iteration to profile."""

    profile_step_end: int = flag(12, minimum=0, needs=[PROFILE])
    """First iteration after the profile."""

    use_pytorch_profiler: bool = flag(False, needs=[PROFILE])
    """Use torch's profiler instead of nsys; writes the trace to --tensorboard-dir."""

    profile_ranks: list[int] = flag([0], needs=[PROFILE_OR_MEMORY])
    """Ranks to profile."""

    record_memory_history: bool = flag(False, needs=[GPU])
    """Record every allocation of GPU memory, on --profile-ranks."""

    memory_snapshot_path: str = flag("snapshot.pickle", metavar="FILE", needs=[MEMORY_HISTORY])
    """File of the memory history, written at the end of the profile or of the run; with several
    --profile-ranks one file per rank, with the rank in its name."""
