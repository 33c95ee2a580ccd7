"""Collective steps that succeed on all ranks or raise on all ranks.

A step that fails on only one rank would leave the others waiting in the next collective until its timeout.
Without a process group these functions just call their argument.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import torch

from megatron_ext import platform
from megatron_ext.common.errors import RunError

T = TypeVar("T")


def ranks() -> int:
    """Number of processes of the job; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def is_last_rank() -> bool:
    """Whether this is the rank that reports: the last one, which holds the loss in every layout."""
    return rank() == ranks() - 1


def print_rank_0(message: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(message, flush=True)


def max_over_ranks(values: list[float]) -> list[float]:
    """The maximum of each value over all ranks; collective."""
    if ranks() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=platform.current_device())
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor.tolist()


def gather(value: T) -> list[T]:
    """Gather ``value`` (any picklable object) from every rank, in rank order; collective.

    Raises RunError if a rank is lost.
    """
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    try:
        torch.distributed.all_gather_object(
            values, value, group=_control_group(torch.distributed.group.WORLD)
        )
    except RuntimeError as error:
        raise RunError(f"a rank of this job has gone or does not answer: {error}") from error
    return values


def on_every_rank(action: Callable[[], T], doing: str | None = None, error: type[Exception] = RunError) -> T:
    """Run ``action``, which must not communicate, and raise on every rank if it failed on any; collective.

    Args:
        doing: the action, for the message "could not ``doing``: ...".
        error: the class to raise.

    Returns:
        the result of ``action`` on this rank.
    """
    result, own = _attempt(action, doing)
    _raise_together(gather(_reason(own)), own, doing, error, ranks())
    return cast(T, result)


def on_first_rank(action: Callable[[], T], doing: str | None = None, error: type[Exception] = RunError) -> T:
    """Run ``action`` on rank 0 only, and return its (picklable) result, or raise its error, on every rank.

    Otherwise as :func:`on_every_rank`.
    """
    result, own = _attempt(action, doing) if rank() == 0 else (None, None)
    answers = gather((result, _reason(own)))
    _raise_together([reason for _, reason in answers], own, doing, error, 1)
    return cast(T, answers[0][0])


def _attempt(action: Callable[[], T], doing: str | None) -> tuple[T | None, Exception | None]:
    """The result of ``action``, or its error; a single process without ``doing`` raises the error itself."""
    try:
        return action(), None
    except Exception as error:
        if ranks() == 1 and doing is None:
            raise
        return None, error


def _raise_together(
    reasons: list[str | None], own: Exception | None, doing: str | None, error: type[Exception], tried: int
) -> None:
    """Raise ``error`` if any of the ``tried`` ranks that ran the step failed."""
    failed = {rank: reason for rank, reason in enumerate(reasons) if reason is not None}
    if not failed:
        return
    if len(set(failed.values())) == 1 and (doing is not None or len(failed) == tried):
        detail = next(iter(failed.values()))
    else:
        detail = "; ".join(f"rank {rank}: {reason}" for rank, reason in failed.items())
    raise error(detail if doing is None else f"could not {doing}: {detail}") from own


def _control_group(world: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    """A gloo group over all ranks, which detects a lost process at once, unlike nccl.

    It has the timeout of the world; gloo's default is half an hour.
    """
    return world if "gloo" in torch.distributed.get_backend(world) else _new_gloo_group(world)


@cache
def _new_gloo_group(world: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    # Not called for a gloo world: the cache would keep its connections open after it is destroyed.
    return torch.distributed.new_group(backend="gloo", timeout=platform.group_timeout(world))


def _reason(error: Exception | None) -> str | None:
    """The message of an error, with the type of an unexpected one."""
    if error is None:
        return None
    named = isinstance(error, (RunError, ValueError, OSError))
    return str(error) if named else f"{type(error).__name__}: {error}"
