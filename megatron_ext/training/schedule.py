"""Learning rate and weight decay over the run, by Megatron-Core's OptimizerParamScheduler.

Its steps are samples, so that batch ramp-up does not bend it. A run in iterations has a schedule in
iterations: resumed with another global batch, its steps are counted anew in samples of that batch.
"""

import math
from argparse import Namespace
from collections.abc import Iterator

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.arguments.derive import running_batch
from megatron_ext.common.errors import RunError

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
    """Upstream's scheduler, which can go on from a checkpoint of a run with another batch."""

    def restore(self, state: dict, saved: Namespace, args: Namespace) -> None:
        """Go to where a checkpoint's schedule was.

        Args:
            state, saved: the scheduler's state and the arguments in the checkpoint.
            args: of this run.

        Raises:
            RunError: the schedule of the flags is another, and none of them says which one is meant.
        """
        if found := conflicts(state, saved, args):
            raise RunError(f"{'; '.join(found)}. {WAYS_OUT}")
        state = in_steps_of(state, saved, args)
        if args.use_checkpoint_opt_param_scheduler:
            unit = batch_of(args)
            self.init_lr = getattr(saved, "lr_warmup_init", self.init_lr)
            self.lr_wsd_decay_style = getattr(saved, "lr_wsd_decay_style", self.lr_wsd_decay_style)
            if (length := _wsd_decay(saved)) is not None:
                self.wsd_decay_steps = length * unit
        else:
            self.override_opt_param_scheduler = True  # what differs does not matter, or is meant
        self.num_steps = 0
        self.load_state_dict(state)
        self.step(increment=0)  # upstream sets the rates before it knows the weight decay


def build_scheduler(optimizer, args: Namespace) -> "Schedule":
    """The schedule the flags describe."""
    return Schedule(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_steps,
        lr_decay_steps=args.lr_decay_steps,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=args.wd_incr_steps,
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=args.wsd_decay_steps,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )


def in_steps_of(state: dict, saved: Namespace, args: Namespace) -> dict:
    """A checkpoint's scheduler state, counted in samples of this run's global batch.

    Runs in samples keep theirs, as do those that were begun in one unit and go on in the other.
    """
    state = {_EARLIER.get(name, name): value for name, value in state.items()}
    factor = 1.0
    if _in_iterations(saved) and _in_iterations(args):
        factor = batch_of(args) / batch_of(saved)
    if factor == 1:
        return state
    return {name: round(value * factor, 6) if name in _STEPS else value for name, value in state.items()}


def batch_of(args: Namespace) -> int:
    """Samples that a step of the schedule counts in a run in iterations; 1 in a run in samples."""
    return running_batch(args) if _in_iterations(args) else 1


def _in_iterations(args: Namespace) -> bool:
    return (
        getattr(args, "train_samples", None) is None and getattr(args, "global_batch_size", None) is not None
    )


def _wsd_decay(args: Namespace) -> int | None:
    """The last part of WSD, in iterations or samples."""
    return getattr(args, "lr_wsd_decay_iters" if _in_iterations(args) else "lr_wsd_decay_samples", None)


def conflicts(state: dict, saved: Namespace, args: Namespace) -> list[str]:
    """What :func:`differences` finds, where the run trains and no flag says which schedule is meant."""
    chosen = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    return [] if chosen or args.skip_train else list(differences(state, saved, args))


def without_a_rate(scheduler: OptimizerParamScheduler, args: Namespace) -> int:
    """Iterations at the end of the run whose learning rate is 0, because the schedule is over before it."""
    if scheduler.lr_decay_style == "constant" or scheduler.min_lr > 0:
        return 0
    steps = args.train_iters * batch_of(args) if _in_iterations(args) else args.train_samples
    return max(0, math.floor((steps - scheduler.lr_decay_steps) / running_batch(args)))


def differences(state: dict, saved: Namespace, args: Namespace) -> Iterator[str]:
    """Where a checkpoint's rates are not those of the flags, a phrase each, in the numbers that were typed.

    What has no effect is passed over, such as the length of a constant schedule.
    """
    state = in_steps_of(state, saved, args)
    for flag, name, ours, unit in _rates(args):
        theirs = state.get(name, getattr(saved, name, None))
        if theirs is None or theirs == ours:
            continue
        if isinstance(theirs, str) or isinstance(ours, str) or ours is None:
            yield f"{flag}: {theirs} there, {ours} here"
        elif not math.isclose(theirs, ours, rel_tol=1e-6):
            yield f"{flag}: {theirs / unit:g} there, {ours / unit:g} here"


def _rates(args: Namespace) -> Iterator[tuple[str, str, object, int]]:
    """(flag, name in a scheduler's state or else in the arguments, value, what the flag counts it in)."""
    in_, unit = ("iters", batch_of(args)) if _in_iterations(args) else ("samples", 1)
    yield "--lr", "max_lr", args.lr, 1
    yield "--lr-decay-style", "lr_decay_style", args.lr_decay_style, 1
    yield f"--lr-warmup-{in_} (or --lr-warmup-fraction)", "lr_warmup_steps", args.lr_warmup_steps, unit
    if args.lr_warmup_steps:
        yield "--lr-warmup-init", "lr_warmup_init", args.lr_warmup_init, 1
    if args.lr_decay_style != "constant":
        yield "--min-lr", "min_lr", args.min_lr, 1
        yield f"--lr-decay-{in_} (by default --train-{in_})", "lr_decay_steps", args.lr_decay_steps, unit
    if args.lr_decay_style == "WSD":
        name = f"lr_wsd_decay_{in_}"
        yield f"--lr-wsd-decay-{in_}", name, getattr(args, name), 1
        yield "--lr-wsd-decay-style", "lr_wsd_decay_style", args.lr_wsd_decay_style, 1
    yield "--weight-decay-incr-style", "wd_incr_style", args.weight_decay_incr_style, 1
    if args.weight_decay_incr_style == "constant":
        yield "--weight-decay", "end_wd", args.end_weight_decay, 1
    else:
        yield "--start-weight-decay", "start_wd", args.start_weight_decay, 1
        yield "--end-weight-decay", "end_wd", args.end_weight_decay, 1
        yield f"--train-{in_}", "wd_incr_steps", args.wd_incr_steps, unit
    if args.optimizer == "adam":
        yield "--adam-beta1", "adam_beta1", args.adam_beta1, 1
        yield "--adam-beta2", "adam_beta2", args.adam_beta2, 1
        yield "--adam-eps", "adam_eps", args.adam_eps, 1
