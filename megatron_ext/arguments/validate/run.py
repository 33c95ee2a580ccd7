"""Rules of batches, duration, optimizer and schedule."""

import signal

from megatron_ext.config import flag_of


def duration_is_given_once(args, typed):
    if args.train_iters is None and args.train_samples is None:
        yield "--train-iters or --train-samples is required"
    if args.train_iters is not None and args.train_samples is not None:
        yield "--train-iters and --train-samples exclude each other"


def units_agree(args, typed):
    """A run in iterations takes flags in iterations, a run in samples flags in samples."""
    in_samples = ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples", "rampup_batch_size")
    in_iterations = ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters")
    if (args.train_iters is None) == (args.train_samples is None):
        return
    unit, other = ("iters", in_samples) if args.train_iters is not None else ("samples", in_iterations)
    wrong = [name for name in other if name in typed]
    if wrong:
        yield f"{', '.join(map(flag_of, wrong))} cannot go with --train-{unit}; give all lengths in {unit}"


def batch_is_divisible(args, typed):
    unit = args.micro_batch_size * args.data_parallel_size
    if args.decrease_batch_size_if_needed and args.global_batch_size >= unit:
        return
    if args.global_batch_size % unit:
        yield (
            f"--global-batch-size {args.global_batch_size} is not divisible by --micro-batch-size "
            f"{args.micro_batch_size} x data parallel size {args.data_parallel_size} = {unit}"
        )


def rampup_reaches_the_batch(args, typed):
    if args.rampup_batch_size is None:
        return
    start, increment, samples = args.rampup_batch_size
    unit = args.micro_batch_size * args.data_parallel_size
    if start < 1 or increment < 1 or samples < 0:
        yield "--rampup-batch-size: START and INCREMENT must be at least 1, SAMPLES 0 or more"
    elif start >= args.global_batch_size or (args.global_batch_size - start) % increment:
        yield (
            f"--rampup-batch-size: from {start} in steps of {increment} the batch does not reach "
            f"--global-batch-size {args.global_batch_size}"
        )
    elif start < unit and args.decrease_batch_size_if_needed:
        yield f"--rampup-batch-size: {start} is less than --micro-batch-size x data parallel size = {unit}"
    elif (start % unit or increment % unit) and not args.decrease_batch_size_if_needed:
        yield (
            f"--rampup-batch-size: {start} and {increment} must be divisible by --micro-batch-size x data "
            f"parallel size = {unit}, or --decrease-batch-size-if-needed given"
        )


def optimizer_is_supported(args, typed):
    if args.optimizer not in ("adam", "sgd"):
        yield f"--optimizer {args.optimizer} is not supported here; use adam or sgd"


def rates_are_ordered(args, typed):
    if args.lr is None:
        yield "--lr is required"
        return
    if args.min_lr > args.lr:
        yield f"--min-lr {args.min_lr} must not exceed --lr {args.lr}"
    if args.lr_warmup_init > args.lr:
        yield f"--lr-warmup-init {args.lr_warmup_init} must not exceed --lr {args.lr}"


def warmup_is_given_once(args, typed):
    both = [name for name in ("lr_warmup_iters", "lr_warmup_samples") if getattr(args, name)]
    if args.lr_warmup_fraction is not None and both:
        yield f"--lr-warmup-fraction and {flag_of(both[0])} exclude each other"


def warmup_ends_before_the_decay(args, typed):
    for warmup, decay, run in (
        (args.lr_warmup_iters, args.lr_decay_iters, args.train_iters),
        (args.lr_warmup_samples, args.lr_decay_samples, args.train_samples),
    ):
        length = decay or run
        if warmup and length and warmup >= length:
            yield f"the warm-up of {warmup} must be shorter than the schedule of {length} (--lr-decay-*)"
    if args.lr_warmup_fraction is not None and args.lr_warmup_fraction >= 1:
        yield f"--lr-warmup-fraction {args.lr_warmup_fraction} leaves nothing to decay"


def stable_schedule_has_an_end(args, typed):
    if args.lr_decay_style != "WSD":
        return
    unit, length = (
        ("samples", args.lr_wsd_decay_samples) if args.train_samples else ("iters", args.lr_wsd_decay_iters)
    )
    whole = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    if length is None:
        yield f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}"
    elif whole and length > whole:
        yield f"--lr-wsd-decay-{unit} {length} exceeds the schedule of {whole} {unit}"


def weight_decay_is_complete(args, typed):
    ends = ("start_weight_decay", "end_weight_decay")
    if args.weight_decay_incr_style == "constant":
        for name in ends:
            if name in typed:
                yield f"{flag_of(name)} cannot take effect: needs --weight-decay-incr-style linear or cosine"
        return
    missing = [name for name in ends if getattr(args, name) is None]
    for name in missing:
        yield f"--weight-decay-incr-style {args.weight_decay_incr_style} needs {flag_of(name)}"
    if not missing and args.end_weight_decay < args.start_weight_decay:
        yield "--end-weight-decay must not be below --start-weight-decay"


def schedule_comes_from_one_place(args, typed):
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        yield "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each other"


def exit_signal_can_be_caught(args, typed):
    if args.exit_signal in (signal.SIGKILL, signal.SIGSTOP):
        yield f"--exit-signal {args.exit_signal.name}: a process cannot handle this signal"


def fused_cross_entropy_is_exact_enough(args, typed):
    """Megatron-Core's returns the gradient of the logits in bf16, whatever they are in, and in any order."""
    if args.cross_entropy_loss_fusion and not args.bf16:
        yield "--cross-entropy-loss-fusion rounds the logits' gradient to bf16: it goes with --bf16 only"
    if args.cross_entropy_loss_fusion and args.deterministic_mode:
        yield "--cross-entropy-loss-fusion is not deterministic: leave it out, or --deterministic-mode"


def profile_has_a_span(args, typed):
    if args.profile and args.profile_step_end <= args.profile_step_start:
        yield (
            f"--profile-step-end {args.profile_step_end} must be above --profile-step-start "
            f"{args.profile_step_start}"
        )


def round_has_its_own_order(args, typed):
    if args.round_index and args.dataloader_type == "cyclic":
        yield (
            "--round-index goes through its samples epoch after epoch, each shuffled anew: "
            "leave out --dataloader-type cyclic"
        )
    if args.round_index and args.round_schedule == "continue" and args.use_checkpoint_opt_param_scheduler:
        yield (
            "--round-schedule continue takes the schedule's length from the command line: leave out "
            "--use-checkpoint-opt_param-scheduler"
        )


def recording_is_possible(args, typed):
    if not args.record_sample_loss:
        return
    if args.context_parallel_size > 1:
        yield "--record-sample-loss does not go with --context-parallel-size above 1; use another layout"
    if args.record_mode == "frozen":
        if args.load is None:
            yield (
                "--record-sample-loss records the losses of a trained model: give its checkpoint with --load "
                "(or --record-mode online to record while training)"
            )
        if args.round_index:
            yield (
                "--record-sample-loss records the whole training set: leave out --round-index (or add "
                "--record-mode online)"
            )
    elif args.skip_train:
        yield "--record-mode online records while training: leave out --skip-train"


RULES = (
    duration_is_given_once,
    units_agree,
    batch_is_divisible,
    rampup_reaches_the_batch,
    optimizer_is_supported,
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
