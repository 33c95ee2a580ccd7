"""Provides an Adam to Megatron-Core if neither Transformer Engine nor Apex does."""

from megatron_ext import platform


def provide_adam(adam: type) -> None:
    """Make Megatron-Core build and checkpoint ``adam`` in the same way as Apex's FusedAdam.

    On a GPU with Transformer Engine or Apex nothing is changed. Otherwise Megatron-Core would
    fall back to torch.optim.AdamW, whose state its distributed optimizer cannot load.

    Serves optimizer/__init__.py 11-34 and 359-363 (class and arguments), and
    optimizer/distrib_optimizer.py 21-36, 484, 640-680 and 818 (where ``step`` is kept).
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if platform.on_gpu() and distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer.Adam = distrib_optimizer.Adam = adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    distrib_optimizer.USING_TE_OPTIMIZER = False
