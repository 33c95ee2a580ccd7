"""What a run leaves behind: checkpoints, logs and profiles."""

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
    """Where checkpoints are written; needs --save-interval."""

    save_interval: int | None = flag(
        None, "--save-interval", "--persistent-save-interval", minimum=1, needs=[SAVE]
    )
    """Iterations between two checkpoints; the end of a run writes one too."""

    save_retain_interval: int | None = flag(None, minimum=1, needs=[SAVE])
    """Keep the checkpoints of iterations that this divides, and the last; remove the others."""

    keep_latest_k: int | None = flag(None, minimum=1, needs=[SAVE])
    """Keep this many of the newest checkpoints, and those that --save-retain-interval keeps; remove the
    others."""

    no_save_optim: bool = flag(False, default=None, needs=[SAVE])
    """Leave the optimizer's state out of checkpoints."""

    no_save_rng: bool = flag(False, default=None, needs=[SAVE])
    """Leave the random number generators' state out of checkpoints."""

    load: str | None = flag(None, metavar="FOLDER")
    """Continue from the last checkpoint in this folder."""

    no_load_optim: bool = flag(False, default=None, needs=[LOAD])
    """Do not load the optimizer's state."""

    no_load_rng: bool = flag(False, default=None, needs=[LOAD])
    """Do not load the random number generators' state."""

    ckpt_step: int | None = flag(None, minimum=1, needs=[LOAD])
    """Load the checkpoint of this iteration instead of the last."""

    finetune: bool = flag(False, needs=[LOAD])
    """Load the weights alone and start at iteration 0, with a new optimizer, schedule and seed."""

    pretrained_checkpoint: str | None = flag(None, metavar="FOLDER", needs=[LOAD])
    """Start from this checkpoint's weights where --load holds no checkpoint yet."""

    exit_on_missing_checkpoint: bool = flag(False, needs=[LOAD])
    """Stop, rather than start from random weights, where --load holds no checkpoint."""

    ckpt_format: Literal["torch", "torch_dist", "torch_dcp", "fsdp_dtensor"] = flag(
        "torch_dist", refused=["torch", "torch_dcp", "fsdp_dtensor"]
    )
    """Format of checkpoints; torch_dist loads into any layout."""

    async_save: bool = flag(False, needs=[SAVE])
    """Write checkpoints while training goes on."""

    ckpt_fully_parallel_save: bool = flag(True, needs=[SAVE])
    """Let one data parallel rank write what all of them hold, instead of dividing the work."""

    distrib_optim_fully_reshardable_mem_efficient: bool = flag(False, needs=[SAVE_SHARDED])
    """Gather the distributed optimizer's state for a checkpoint on one data parallel rank, over gloo: slower,
    and the others need no memory for it."""

    use_checkpoint_args: bool = False
    """Take the tokenizer, the sequence length and the dropouts too from the checkpoint in --load, or, where
    there is none yet, in --pretrained-checkpoint; flags given here win, a preset does not."""

    ckpt_fully_parallel_load: bool = False
    """Let each rank read only what it needs; always so here."""

    auto_detect_ckpt_format: bool = False
    """Find out a checkpoint's format; always so here, where torch_dist is the one that is read."""

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
    """What to do where a checkpoint and the model do not hold the same parameters."""


@dataclass(kw_only=True)
class LoggingConfig:
    """The log line, TensorBoard and Weights & Biases."""

    log_interval: int = flag(100, minimum=1)
    """Iterations between two log lines."""

    log_throughput: bool = False
    """Add TFLOP/s of each device to the log line."""

    log_params_norm: bool = False
    """Add the norm of the parameters."""

    log_num_zeros_in_grad: bool = False
    """Add the number of zeros in the gradient."""

    log_progress: bool = flag(False, needs=[SAVE])
    """Append job id, GPUs, and what was trained to progress.txt in the --save folder."""

    timing_log_level: Literal[0, 1, 2] = 0
    """0 times iterations, 1 their larger parts, 2 the smaller ones."""

    timing_log_option: Literal["max", "minmax", "all"] = "minmax"
    """Times over the ranks: the largest, both ends, or every one."""

    barrier_with_L1_time: bool = flag(True, "--no-barrier-with-level-1-timing")
    """Do not wait for all ranks before a time of level 1."""

    metrics_file: str | None = flag(None, metavar="FILE")
    """Write a JSON object for every iteration and validation to this file, one a line."""

    tensorboard_dir: str | None = flag(None, metavar="FOLDER")
    """Write TensorBoard events to this folder."""

    tensorboard_log_interval: int = flag(1, minimum=1, needs=[TENSORBOARD])
    """Iterations between two TensorBoard points."""

    tensorboard_queue_size: int = flag(1000, minimum=1, needs=[TENSORBOARD])
    """TensorBoard points that wait to be written."""

    log_timers_to_tensorboard: bool = flag(False, needs=[TENSORBOARD])
    """Times to TensorBoard too."""

    log_loss_scale_to_tensorboard: bool = flag(True, needs=[TENSORBOARD])
    """No loss scale to TensorBoard."""

    log_validation_ppl_to_tensorboard: bool = flag(False, needs=[TENSORBOARD])
    """Validation perplexity to TensorBoard too."""

    log_memory_to_tensorboard: bool = flag(False, needs=[TENSORBOARD])
    """Memory use to TensorBoard too."""

    log_world_size_to_tensorboard: bool = flag(False, needs=[TENSORBOARD])
    """The number of processes to TensorBoard too."""

    wandb_project: str | None = None
    """Weights & Biases project; without it there is no logging there."""

    wandb_exp_name: str | None = flag(None, needs=[WANDB])
    """Weights & Biases name of the run."""

    wandb_save_dir: str | None = flag(None, metavar="FOLDER", needs=[WANDB])
    """Folder for Weights & Biases files."""

    wandb_entity: str | None = flag(None, needs=[WANDB])
    """Weights & Biases team or user."""


@dataclass(kw_only=True)
class ProfilingConfig:
    """Profiles of some iterations."""

    profile: bool = False
    """Profile the iterations from --profile-step-start to --profile-step-end."""

    profile_step_start: int = flag(10, minimum=0, needs=[PROFILE])
    """First iteration that is profiled."""

    profile_step_end: int = flag(12, minimum=0, needs=[PROFILE])
    """First iteration that is not profiled any more."""

    use_pytorch_profiler: bool = flag(False, needs=[PROFILE])
    """torch's profiler instead of nsys; the trace goes to --tensorboard-dir."""

    profile_ranks: list[int] = flag([0], needs=[PROFILE_OR_MEMORY])
    """Ranks that are profiled."""

    record_memory_history: bool = flag(False, needs=[GPU])
    """Record every allocation of GPU memory, on --profile-ranks."""

    memory_snapshot_path: str = flag("snapshot.pickle", metavar="FILE", needs=[MEMORY_HISTORY])
    """Where the memory record goes, at the end of the profile or of the run; with several --profile-ranks
    a file each, with its rank in the name."""
