"""Learning rate and weight decay over the run, by Megatron-Core's OptimizerParamScheduler.

Its steps are samples, so that batch ramp-up does not change its shape. A run whose length is given in
iterations has a schedule in iterations: if it is resumed with another global batch size, the steps are
converted to samples of that batch.
"""

import math
from collections.abc import Iterator
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.arguments.defaults import running_batch
from megatron_ext.checkpoint.saved_args import run_of
from megatron_ext.common.errors import RunError
from megatron_ext.config import RunConfig
from megatron_ext.config.model_function import Saved
from megatron_ext.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig

#: In a scheduler's state these are numbers of samples.
_STEPS = ("num_steps", "lr_warmup_steps", "lr_decay_steps", "wd_incr_steps")
#: Earlier names of upstream's state.
_EARLIER = {
    "start_lr": "max_lr",
    "warmup_iter": "lr_warmup_steps",
    "warmup_steps": "lr_warmup_steps",
    "end_iter": "lr_decay_steps",
    "decay_steps": "lr_decay_steps",
    "decay_style": "lr_decay_style",
    "num_iters": "num_steps",
}
WAYS_OUT = (
    "--override-opt_param-scheduler goes on with these flags, --use-checkpoint-opt_param-scheduler with the "
    "checkpoint's schedule"
)


class Schedule(OptimizerParamScheduler):
    """Upstream's scheduler, which can also resume from a checkpoint with another batch size."""

    init_lr: float
    lr_wsd_decay_style: str

    def restore(self, state: dict[str, Any], saved: Saved, run: RunConfig) -> None:
        """Restore the position of a checkpoint's schedule.

        Args:
            state, saved: the scheduler's state and the arguments in the checkpoint.
            run: the configuration of this run.

        Raises:
            RunError: the flags describe another schedule, and none of them selects one of the two.
        """
        if conflicting := conflicts(state, saved, run):
            raise RunError(f"{'; '.join(conflicting)}. {WAYS_OUT}")
        state = in_steps_of(state, saved, run)
        if run.schedule.use_checkpoint_opt_param_scheduler:
            unit = batch_of(run)
            self.init_lr = saved.get("lr_warmup_init", self.init_lr)
            self.lr_wsd_decay_style = saved.get("lr_wsd_decay_style", self.lr_wsd_decay_style)
            theirs = run_of(saved)
            if (length := _wsd_decay(theirs.schedule, _in_iterations(theirs.training))) is not None:
                self.wsd_decay_steps = length * unit
        else:
            self.override_opt_param_scheduler = True  # differences have no effect or are intended
        self.num_steps = 0
        self.load_state_dict(state)
        self.step(increment=0)  # upstream sets the rates before the weight decay is known


def build_scheduler(
    optimizer: MegatronOptimizer, schedule: ScheduleConfig, decay: OptimizerConfig
) -> Schedule:
    """The schedule of learning rate and weight decay that the flags describe."""
    return Schedule(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=schedule.lr,
        min_lr=schedule.min_lr,
        lr_warmup_steps=schedule.lr_warmup_steps,
        lr_decay_steps=schedule.lr_decay_steps,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=decay.start_weight_decay,
        end_wd=decay.end_weight_decay,
        wd_incr_steps=schedule.wd_incr_steps,
        wd_incr_style=decay.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=schedule.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=schedule.override_opt_param_scheduler,
        wsd_decay_steps=schedule.wsd_decay_steps,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )


def in_steps_of(state: dict[str, Any], saved: Saved, run: RunConfig) -> dict[str, Any]:
    """A checkpoint's scheduler state, with its steps converted to samples of this run's global batch.

    The steps do not change if either run has its length in samples.
    """
    state = {_EARLIER.get(name, name): value for name, value in state.items()}
    factor = 1.0
    theirs = run_of(saved)
    if _in_iterations(theirs.training) and _in_iterations(run.training):
        factor = batch_of(run) / batch_of(theirs)
    if factor == 1:
        return state
    return {name: round(value * factor, 6) if name in _STEPS else value for name, value in state.items()}


def batch_of(run: RunConfig) -> int:
    """Samples per step of the schedule: the global batch in a run in iterations, 1 in a run in samples."""
    return running_batch(run) if _in_iterations(run.training) else 1


def _in_iterations(training: TrainingConfig) -> bool:
    return training.train_samples is None and bool(training.global_batch_size)


def _wsd_decay(schedule: ScheduleConfig, in_iterations: bool) -> int | None:
    """The length of WSD's decay, in iterations or samples."""
    return schedule.lr_wsd_decay_iters if in_iterations else schedule.lr_wsd_decay_samples


def conflicts(state: dict[str, Any], saved: Saved, run: RunConfig) -> list[str]:
    """The :func:`differences`, unless a flag selects one of the schedules or the run does not train."""
    chosen = run.schedule.override_opt_param_scheduler or run.schedule.use_checkpoint_opt_param_scheduler
    return [] if chosen or run.validation.skip_train else list(differences(state, saved, run))


def without_a_rate(scheduler: OptimizerParamScheduler, run: RunConfig) -> int:
    """Iterations at the end of the run whose learning rate is 0, because the schedule ends earlier."""
    if scheduler.lr_decay_style == "constant" or scheduler.min_lr > 0:
        return 0
    training = run.training
    steps = training.train_iters * batch_of(run) if _in_iterations(training) else training.train_samples
    return max(0, math.floor((steps - scheduler.lr_decay_steps) / running_batch(run)))


def differences(state: dict[str, Any], saved: Saved, run: RunConfig) -> Iterator[str]:
    """The differences between a checkpoint's schedule and the flags, a phrase each, in the flags' units.

    Settings without effect are ignored, such as the length of a constant schedule.
    """
    state = in_steps_of(state, saved, run)
    for flag, name, ours, unit in _rates(run):
        theirs = state.get(name, saved.get(name))
        if theirs is None or theirs == ours:
            continue
        if isinstance(theirs, str) or isinstance(ours, str) or ours is None:
            yield f"{flag}: {theirs} there, {ours} here"
        elif not math.isclose(theirs, ours, rel_tol=1e-6):
            yield f"{flag}: {theirs / unit:g} there, {ours / unit:g} here"


def _rates(run: RunConfig) -> Iterator[tuple[str, str, Any, int]]:
    """(flag, name in a scheduler's state or else in the arguments, value, unit of the flag)."""
    in_, unit = ("iters", batch_of(run)) if _in_iterations(run.training) else ("samples", 1)
    yield "--lr", "max_lr", run.schedule.lr, 1
    yield "--lr-decay-style", "lr_decay_style", run.schedule.lr_decay_style, 1
    yield (
        f"--lr-warmup-{in_} (or --lr-warmup-fraction)",
        "lr_warmup_steps",
        run.schedule.lr_warmup_steps,
        unit,
    )
    if run.schedule.lr_warmup_steps:
        yield "--lr-warmup-init", "lr_warmup_init", run.schedule.lr_warmup_init, 1
    if run.schedule.lr_decay_style != "constant":
        yield "--min-lr", "min_lr", run.schedule.min_lr, 1
        yield (
            f"--lr-decay-{in_} (by default --train-{in_})",
            "lr_decay_steps",
            run.schedule.lr_decay_steps,
            unit,
        )
    if run.schedule.lr_decay_style == "WSD":
        name = f"lr_wsd_decay_{in_}"
        yield f"--lr-wsd-decay-{in_}", name, run.get(name), 1
        yield "--lr-wsd-decay-style", "lr_wsd_decay_style", run.schedule.lr_wsd_decay_style, 1
    yield "--weight-decay-incr-style", "wd_incr_style", run.optimizer.weight_decay_incr_style, 1
    if run.optimizer.weight_decay_incr_style == "constant":
        yield "--weight-decay", "end_wd", run.optimizer.end_weight_decay, 1
    else:
        yield "--start-weight-decay", "start_wd", run.optimizer.start_weight_decay, 1
        yield "--end-weight-decay", "end_wd", run.optimizer.end_weight_decay, 1
        yield f"--train-{in_}", "wd_incr_steps", run.schedule.wd_incr_steps, unit
    if run.optimizer.optimizer == "adam":
        yield "--adam-beta1", "adam_beta1", run.optimizer.adam_beta1, 1
        yield "--adam-beta2", "adam_beta2", run.optimizer.adam_beta2, 1
        yield "--adam-eps", "adam_eps", run.optimizer.adam_eps, 1
