"""One error for all ranks."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

from megatron_ext import platform
from megatron_ext.training.errors import RunError

T = TypeVar("T")


class CheckpointError(RunError):
    """A checkpoint cannot be written, or cannot be used; the message names it and says what to do."""


class DamagedCheckpoint(CheckpointError):
    """The files of a checkpoint are not what was written."""


@cache
def _control_group(world: Any):
    """A gloo group over all ranks: it notices at once when a process has gone, which nccl does not.

    It waits as long as the world does: left to gloo, half an hour.
    """
    if "gloo" in torch.distributed.get_backend(world):
        return world
    return torch.distributed.new_group(backend="gloo", timeout=platform.group_timeout(world))


def gather(value: Any) -> list[Any]:
    """``value`` (anything that pickles) of every rank, in the order of the ranks; collective.

    Raises CheckpointError if a rank has gone.
    """
    if torch.distributed.get_world_size() == 1:
        return [value]
    values = [None] * torch.distributed.get_world_size()
    try:
        torch.distributed.all_gather_object(
            values, value, group=_control_group(torch.distributed.group.WORLD)
        )
    except RuntimeError as error:
        raise CheckpointError(f"a rank of this job has gone or does not answer: {error}") from error
    return values


def together(doing: str, action: Callable[[], T]) -> T:
    """Run ``action``, which must not communicate, and raise on every rank if it failed on any.

    So no rank waits for one that has given up. Returns what ``action`` returned on this rank.

    Raises:
        CheckpointError: "could not ``doing``", with every rank's own reason; collective.
    """
    result, own = None, None
    try:
        result = action()
    except Exception as error:
        own = error
    reasons = gather(None if own is None else _reason(own))
    if any(reasons):
        failed = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
        alike = {reason for reason in reasons if reason}
        detail = alike.pop() if len(alike) == 1 else "; ".join(failed)
        raise CheckpointError(f"could not {doing}: {detail}") from own
    return result


def on_rank_0(doing: str, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 alone and give its result, or its error, to every rank; collective."""
    first = torch.distributed.get_rank() == 0
    result = together(doing, action if first else lambda: None)
    return gather(result)[0]


def _reason(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"
