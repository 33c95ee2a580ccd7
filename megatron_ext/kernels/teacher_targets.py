"""What a student learns from its teacher for each token: a distribution over the student's vocabulary.

It comes whole, a shard on each tensor parallel rank, or as its k largest probabilities, which every rank has.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.kernels.cross_entropy import Group, _padding, width_of_shard
from megatron_ext.kernels.gather import gathered


@dataclass(frozen=True)
class WholeTargets:
    """The teacher's distribution softmax(logits / temperature), over the student's vocabulary.

    Attributes:
        logits: [..., v], a shard with the columns of the student's logits; -inf for what is never predicted.
            Columns of padding are not read.
        mask: [...], bool, the tokens that have a target; None for all.
    """

    logits: Tensor
    temperature: float = 1.0
    mask: Tensor | None = None


@dataclass(frozen=True)
class TopTargets:
    """The largest probabilities of the teacher's distribution at ``temperature``; the same on every shard.

    Attributes:
        ids: [..., k], int64, over the whole vocabulary; distinct, -1 for none.
        logprobs: [..., k], float32, their natural logarithms; -inf for none.
        rest: [...], float32, the probability of all other ids together. All sum to 1.
        mask: [...], bool, the tokens that have a target; None for all.
    """

    ids: Tensor
    logprobs: Tensor
    rest: Tensor
    temperature: float = 1.0
    mask: Tensor | None = None


#: What a student is to learn from its teacher, for each token.
TeacherTargets: TypeAlias = WholeTargets | TopTargets


def largest(
    targets: WholeTargets, k: int, first: int = 0, group: Group = None, vocab_size: int | None = None
) -> TopTargets:
    """The ``k`` most likely ids of a whole distribution; the same on every rank of ``group``.

    Args:
        targets: a shard, whose columns begin at ``first`` in the vocabulary.
        vocab_size: columns of the whole vocabulary that take part; None for all. With fewer than ``k`` of
            them the last ids are -1.
    """
    logits, temperature = targets.logits, targets.temperature
    wide = logits if logits.dtype == torch.float64 else logits.float()
    width = width_of_shard(logits.size(-1), first, vocab_size)
    wide = wide.masked_fill(_padding(logits, width), -torch.inf) / temperature
    own, column = wide.topk(min(k, logits.size(-1)), dim=-1)
    values, ids = gathered(own, group, dim=-1), gathered(column + first, group, dim=-1)
    values, order = values.topk(min(k, values.size(-1)), dim=-1)
    ids = ids.gather(-1, order)
    top = values[..., :1]
    e = (wide - top).exp()
    mine = (ids >= first) & (ids < first + logits.size(-1))
    others = _without(e, (ids - first).masked_fill(~mine, 0), mine).sum(-1)
    if group is not None and group.size() > 1:
        dist.all_reduce(others, group=group)
    total = others + (values - top).exp().sum(-1)
    logprobs = values - top - total.log()[..., None]
    missing = k - ids.size(-1)
    ids = F.pad(ids.masked_fill(values == -torch.inf, -1), (0, missing), value=-1)
    logprobs = F.pad(logprobs, (0, missing), value=-torch.inf)
    return TopTargets(ids, logprobs, others / total, temperature, targets.mask)


def _without(e: Tensor, column: Tensor, mine: Tensor) -> Tensor:
    """``e`` [..., v] with 0 at ``column`` [..., k] where ``mine``."""
    factor = torch.ones_like(column, dtype=e.dtype).masked_fill(mine, 0.0)
    return e.scatter_reduce(-1, column, factor * e.gather(-1, column), "amin")
