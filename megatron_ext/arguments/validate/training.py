"""Rules of batches, duration, optimizer and schedule."""

import signal

from megatron_ext.arguments.validate.rule import Problems, Typed
from megatron_ext.config import RunConfig, flag_of


def duration_is_given_once(run: RunConfig, typed: Typed) -> Problems:
    if run.training.train_iters is None and run.training.train_samples is None:
        yield "--train-iters or --train-samples is required"
    if run.training.train_iters is not None and run.training.train_samples is not None:
        yield "--train-iters and --train-samples exclude each other"


def units_agree(run: RunConfig, typed: Typed) -> Problems:
    """A run in iterations must use flags in iterations, a run in samples flags in samples."""
    in_samples = ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples", "rampup_batch_size")
    in_iterations = ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters")
    if (run.training.train_iters is None) == (run.training.train_samples is None):
        return
    unit, other = (
        ("iters", in_samples) if run.training.train_iters is not None else ("samples", in_iterations)
    )
    wrong = [name for name in other if name in typed]
    if wrong:
        yield f"{', '.join(map(flag_of, wrong))} cannot go with --train-{unit}; give all lengths in {unit}"


def batch_is_divisible(run: RunConfig, typed: Typed) -> Problems:
    unit = run.samples_at_once
    if run.training.decrease_batch_size_if_needed and run.training.global_batch_size >= unit:
        return
    if run.training.global_batch_size % unit:
        yield (
            f"--global-batch-size {run.training.global_batch_size} is not divisible by --micro-batch-size "
            f"{run.training.micro_batch_size} x data parallel size {run.parallel.data_parallel_size} = {unit}"
        )


def rampup_reaches_the_batch(run: RunConfig, typed: Typed) -> Problems:
    if run.training.rampup_batch_size is None:
        return
    start, increment, samples = run.training.rampup_batch_size
    unit = run.samples_at_once
    if start < 1 or increment < 1 or samples < 0:
        yield "--rampup-batch-size: START and INCREMENT must be at least 1, SAMPLES 0 or more"
    elif start >= run.training.global_batch_size or (run.training.global_batch_size - start) % increment:
        yield (
            f"--rampup-batch-size: from {start} in steps of {increment} the batch does not reach "
            f"--global-batch-size {run.training.global_batch_size}"
        )
    elif start < unit and run.training.decrease_batch_size_if_needed:
        yield f"--rampup-batch-size: {start} is less than --micro-batch-size x data parallel size = {unit}"
    elif (start % unit or increment % unit) and not run.training.decrease_batch_size_if_needed:
        yield (
            f"--rampup-batch-size: {start} and {increment} must be divisible by --micro-batch-size x data "
            f"parallel size = {unit}, or --decrease-batch-size-if-needed given"
        )


def muon_is_possible(run: RunConfig, typed: Typed) -> Problems:
    """What Megatron-Core's Muon refuses too, and what is not here."""
    if run.optimizer.muon_tp_mode == "distributed":
        yield "--muon-tp-mode distributed is not supported here; duplicated computes the same update"
    name = f"--optimizer {run.optimizer.optimizer}"
    if run.optimizer.is_muon and run.parallel.use_distributed_optimizer:
        yield f"{name} needs whole matrices and --use-distributed-optimizer cuts them: --optimizer dist_muon"
    if run.optimizer.is_muon and run.precision.fp16:
        yield f"{name} cannot take --fp16: use --bf16 or fp32"


def no_gradient_is_unscaled_twice(run: RunConfig, typed: Typed) -> Problems:
    if run.training.grad_norm_skip_threshold is not None and run.precision.fp16:
        yield "--grad-norm-skip-threshold cannot take --fp16, whose gradients are scaled: use --bf16 or fp32"


def z_loss_is_computed(run: RunConfig, typed: Typed) -> Problems:
    if run.optimizer.z_loss_coeff and run.layers.cross_entropy_loss_fusion:
        yield "--z-loss-coeff is computed by the loss of this project: leave out --cross-entropy-loss-fusion"


def rates_are_ordered(run: RunConfig, typed: Typed) -> Problems:
    if run.schedule.lr is None:
        yield "--lr is required"
        return
    if run.schedule.min_lr > run.schedule.lr:
        yield f"--min-lr {run.schedule.min_lr} must not exceed --lr {run.schedule.lr}"
    if run.schedule.lr_warmup_init > run.schedule.lr:
        yield f"--lr-warmup-init {run.schedule.lr_warmup_init} must not exceed --lr {run.schedule.lr}"


def warmup_is_given_once(run: RunConfig, typed: Typed) -> Problems:
    both = [name for name in ("lr_warmup_iters", "lr_warmup_samples") if run.get(name)]
    if run.schedule.lr_warmup_fraction is not None and both:
        yield f"--lr-warmup-fraction and {flag_of(both[0])} exclude each other"


def warmup_ends_before_the_decay(run: RunConfig, typed: Typed) -> Problems:
    for warmup, decay, whole in (
        (run.schedule.lr_warmup_iters, run.schedule.lr_decay_iters, run.training.train_iters),
        (run.schedule.lr_warmup_samples, run.schedule.lr_decay_samples, run.training.train_samples),
    ):
        length = decay or whole
        if warmup and length and warmup >= length:
            yield f"the warm-up of {warmup} must be shorter than the schedule of {length} (--lr-decay-*)"
    if run.schedule.lr_warmup_fraction is not None and run.schedule.lr_warmup_fraction >= 1:
        yield f"--lr-warmup-fraction {run.schedule.lr_warmup_fraction} leaves nothing to decay"


def stable_schedule_has_an_end(run: RunConfig, typed: Typed) -> Problems:
    if run.schedule.lr_decay_style != "WSD":
        return
    unit, length = (
        ("samples", run.schedule.lr_wsd_decay_samples)
        if run.training.train_samples
        else ("iters", run.schedule.lr_wsd_decay_iters)
    )
    whole = run.get(f"lr_decay_{unit}") or run.get(f"train_{unit}")
    if length is None:
        yield f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}"
    elif whole and length > whole:
        yield f"--lr-wsd-decay-{unit} {length} exceeds the schedule of {whole} {unit}"


def weight_decay_is_complete(run: RunConfig, typed: Typed) -> Problems:
    ends = ("start_weight_decay", "end_weight_decay")
    if run.optimizer.weight_decay_incr_style == "constant":
        for name in ends:
            if name in typed:
                yield f"{flag_of(name)} cannot take effect: needs --weight-decay-incr-style linear or cosine"
        return
    for name in ends:
        if run.get(name) is None:
            yield f"--weight-decay-incr-style {run.optimizer.weight_decay_incr_style} needs {flag_of(name)}"
    start, end = run.optimizer.start_weight_decay, run.optimizer.end_weight_decay
    if start is not None and end is not None and end < start:
        yield "--end-weight-decay must not be below --start-weight-decay"


def schedule_comes_from_one_place(run: RunConfig, typed: Typed) -> Problems:
    if run.schedule.override_opt_param_scheduler and run.schedule.use_checkpoint_opt_param_scheduler:
        yield "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each other"


def exit_signal_can_be_caught(run: RunConfig, typed: Typed) -> Problems:
    if run.training.exit_signal in (signal.SIGKILL, signal.SIGSTOP):
        yield f"--exit-signal {run.training.exit_signal.name}: a process cannot handle this signal"


def fused_cross_entropy_is_exact_enough(run: RunConfig, typed: Typed) -> Problems:
    """Megatron-Core's returns the logits' gradient in bf16 for any dtype, and is not deterministic."""
    if run.layers.cross_entropy_loss_fusion and not run.precision.bf16:
        yield "--cross-entropy-loss-fusion rounds the logits' gradient to bf16: it goes with --bf16 only"
    if run.layers.cross_entropy_loss_fusion and run.layers.deterministic_mode:
        yield "--cross-entropy-loss-fusion is not deterministic: leave it out, or --deterministic-mode"


def profile_has_a_span(run: RunConfig, typed: Typed) -> Problems:
    if run.profiling.profile and run.profiling.profile_step_end <= run.profiling.profile_step_start:
        yield (
            f"--profile-step-end {run.profiling.profile_step_end} must be above --profile-step-start "
            f"{run.profiling.profile_step_start}"
        )


def round_has_its_own_order(run: RunConfig, typed: Typed) -> Problems:
    if run.rounds.round_index and run.data.dataloader_type == "cyclic":
        yield (
            "--round-index goes through its samples epoch after epoch, each shuffled anew: "
            "leave out --dataloader-type cyclic"
        )
    if (
        run.rounds.round_index
        and run.rounds.round_schedule == "continue"
        and run.schedule.use_checkpoint_opt_param_scheduler
    ):
        yield (
            "--round-schedule continue takes the schedule's length from the command line: leave out "
            "--use-checkpoint-opt_param-scheduler"
        )


def recording_is_possible(run: RunConfig, typed: Typed) -> Problems:
    if not run.rounds.record_sample_loss:
        return
    if run.parallel.context_parallel_size > 1:
        yield "--record-sample-loss does not go with --context-parallel-size above 1; use another layout"
    if run.rounds.record_mode == "frozen":
        if run.checkpoint.load is None:
            yield (
                "--record-sample-loss records the losses of a trained model: give its checkpoint with --load "
                "(or --record-mode online to record while training)"
            )
        if run.rounds.round_index:
            yield (
                "--record-sample-loss records the whole training set: leave out --round-index (or add "
                "--record-mode online)"
            )
    elif run.validation.skip_train:
        yield "--record-mode online records while training: leave out --skip-train"


RULES = (
    duration_is_given_once,
    units_agree,
    batch_is_divisible,
    rampup_reaches_the_batch,
    muon_is_possible,
    no_gradient_is_unscaled_twice,
    z_loss_is_computed,
    rates_are_ordered,
    warmup_is_given_once,
    warmup_ends_before_the_decay,
    stable_schedule_has_an_end,
    weight_decay_is_complete,
    schedule_comes_from_one_place,
    exit_signal_can_be_caught,
    fused_cross_entropy_is_exact_enough,
    profile_has_a_span,
    round_has_its_own_order,
    recording_is_possible,
)
