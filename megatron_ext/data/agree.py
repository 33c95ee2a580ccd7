"""Steps of a distributed job that either succeed on all ranks or raise on all ranks.

A step that fails on one rank alone leaves the others waiting in the next collective until its
timeout. Without an initialised process group these functions just call their argument.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from megatron_ext.data.indexed import DatasetError

T = TypeVar("T")


def on_first_rank(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and give its (picklable) result, or its error, to every rank."""
    if not torch.distributed.is_initialized():
        return action()
    outcome: list = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [action(), None]
        except Exception as error:
            outcome, cause = [None, _describe(error)], error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is None:
        return outcome[0]
    if torch.distributed.get_rank() == 0:
        raise DatasetError(outcome[1]) from cause
    raise DatasetError(outcome[1])


def on_every_rank(action: Callable[[], T]) -> T:
    """Run ``action`` on each rank; if it fails on any, raise on all."""
    if not torch.distributed.is_initialized():
        return action()
    result, problem, cause = None, None, None
    try:
        result = action()
    except Exception as error:
        problem, cause = _describe(error), error
    problems: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    failed = {rank: text for rank, text in enumerate(problems) if text is not None}
    if not failed:
        return result
    rank, text = next(iter(failed.items()))
    others = "" if len(set(failed.values())) == 1 else f" (and {len(failed) - 1} other ranks)"
    raise DatasetError(text if len(failed) == len(problems) else f"rank {rank}{others}: {text}") from cause


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, (DatasetError, OSError)) else f"{type(error).__name__}: {error}"
