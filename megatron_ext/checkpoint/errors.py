"""Errors of checkpoints, and collective steps that raise them on all ranks or on none."""

from collections.abc import Callable
from typing import TypeVar

from megatron_ext.common.errors import RunError
from megatron_ext.platform.collective import on_every_rank, on_first_rank

T = TypeVar("T")


class CheckpointError(RunError):
    """A checkpoint cannot be written or used; the message names it and says what to do."""


class DamagedCheckpoint(CheckpointError):
    """The files of a checkpoint differ from what was written."""


def together(doing: str, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; CheckpointError, "could not ``doing``", on all if it failed on any."""
    return on_every_rank(action, doing, CheckpointError)


def on_rank_0(doing: str, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and give its result, or CheckpointError, to every rank."""
    return on_first_rank(action, doing, CheckpointError)
