"""Learning rate and weight decay over the run, by Megatron-Core's OptimizerParamScheduler."""

from argparse import Namespace

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def build_scheduler(optimizer, args: Namespace) -> OptimizerParamScheduler:
    """The schedule the flags describe; its steps are samples, so that batch ramp-up does not bend it."""
    return OptimizerParamScheduler(
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
