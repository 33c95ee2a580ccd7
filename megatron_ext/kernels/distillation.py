"""Cross entropy and the divergence from a teacher, over a vocabulary split among tensor parallel ranks.

Per token, with the student's logits l, the label y, and the teacher's distribution q at temperature T:

    cross entropy = log sum_j exp(l_j) - l_y
    divergence    = KL(q || p) = sum_j q_j (log q_j - log p_j),    p = softmax(l / T)

The teacher's distribution comes whole, or as its k largest probabilities with all others in one bucket; the
divergence is then between distributions over k + 1 outcomes, and the student's last is what remains of p.

As in ``cross_entropy.py`` a shard is read once for its statistics, two small all-reduces join the shards, and
backward overwrites the logits with their gradient:

    d divergence / d l_j = (p_j - q_j) / T        with the whole distribution, and for the k largest of it
                         = p_j (1 - q_r / p_r) / T    for the others of a bucket of q_r, where p has p_r
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.kernels.cross_entropy import Group, _columns, width_of_shard
from megatron_ext.kernels.distillation_shard import shard_grad_, shard_stats
from megatron_ext.kernels.teacher_targets import TeacherTargets, TopTargets, WholeTargets


class Stats(NamedTuple):
    """What a shard, or after :func:`combine_stats` the vocabulary, knows of both losses; [rows] each.

    Attributes:
        top: max_j l_j.
        total: sum_j exp(l_j - top).
        chosen: the label's logit; 0 where another shard has it.
        soft: sum_j exp((l_j - top) / T).
        teacher_top: max_j u_j of the teacher's logits; 0 for the largest probabilities.
        teacher_total: sum_j e_j with e_j = exp((u_j - teacher_top) / T); or the sum of the largest.
        cross: sum_j e_j ((u_j - teacher_top) - (l_j - top)) / T, with u_j = T log q_j for the largest.
        others: sum_j exp((l_j - top) / T) over all but the largest; 0 for a whole distribution.
    """

    top: Tensor
    total: Tensor
    chosen: Tensor
    soft: Tensor
    teacher_top: Tensor
    teacher_total: Tensor
    cross: Tensor
    others: Tensor


def distillation_stats(
    logits: Tensor, target: Tensor, targets: TeacherTargets, first: int = 0, width: int | None = None
) -> Stats:
    """What a shard of the vocabulary knows of the two losses, in one pass over it.

    Args:
        logits: [rows, v], columns first .. first + v of the vocabulary; contiguous.
        target: [rows], int64, over the whole vocabulary.
        targets: of the same rows.
        width: columns that take part; None for all.
    """
    width = logits.size(1) if width is None else width
    if isinstance(targets, WholeTargets):
        found = shard_stats(logits, target, targets.logits, targets.temperature, first, width)
        return Stats(*(*found, torch.zeros_like(found[0])))
    return _stats_of_largest(logits, target, targets, first, width)


def _stats_of_largest(logits: Tensor, target: Tensor, targets: TopTargets, first: int, width: int) -> Stats:
    """The k largest are left out of the pass and then added, so that the others' sum loses no digits."""
    place = _place(targets, first, width)
    column, ours = _columns(logits, target, first)
    label = logits.gather(1, column[:, None])[:, 0].masked_fill(~ours | (column >= width), 0.0)
    label = label.masked_fill(ours & (column >= width), -torch.inf)
    plain = logits.data  # what is overwritten here is put back: autograd need not know
    largest = plain[place[0], place[1]]
    plain[place[0], place[1]] = -torch.inf
    top, total, _, soft, *_ = shard_stats(logits, target, None, targets.temperature, first, width)
    plain[place[0], place[1]] = largest
    q = targets.logprobs.to(top.dtype)
    l = torch.full_like(q, -torch.inf)  # noqa: E741
    l[place[0], place[2]] = largest.to(top.dtype)
    here = torch.zeros_like(q, dtype=torch.bool)
    here[place[0], place[2]] = True
    higher = torch.maximum(top, l.amax(-1))
    base = higher.masked_fill(higher == -torch.inf, 0.0)
    x = l - base[:, None]
    down = top - base
    others = soft * (down / targets.temperature).exp()
    probability = q.exp() * here
    cross = torch.where(probability == 0, 0.0, probability * (q - x / targets.temperature))
    return Stats(
        top=higher,
        total=total * down.exp() + x.exp().sum(-1),
        chosen=label.to(top.dtype),
        soft=others + (x / targets.temperature).exp().sum(-1),
        teacher_top=torch.zeros_like(top),
        teacher_total=probability.sum(-1),
        cross=cross.sum(-1),
        others=others,
    )


def _place(targets: TopTargets, first: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column in the shard, and rank among the k of each of the largest that lies in the shard."""
    column = targets.ids - first
    row, rank = ((targets.ids >= 0) & (column >= 0) & (column < width)).nonzero(as_tuple=True)
    return row, column[row, rank], rank


def combine_stats(stats: Stats, temperature: float, group: Group = None) -> Stats:
    """The same numbers over the whole vocabulary: two all-reduces of a few numbers a row over ``group``."""
    if group is None or group.size() == 1:
        return stats
    tops = torch.stack((stats.top, stats.teacher_top))
    dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack(_relative_to(stats, tops[0], tops[1], temperature))
    dist.all_reduce(sums, group=group)
    total, chosen, soft, teacher_total, cross, others = sums
    return Stats(tops[0], total, chosen, soft, tops[1], teacher_total, cross, others)


def _relative_to(stats: Stats, top: Tensor, teacher_top: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """A shard's sums, with the maxima of the whole vocabulary in the place of its own."""
    down, teacher_down = stats.top - top, stats.teacher_top - teacher_top
    soft, weight = (down / temperature).exp(), (teacher_down / temperature).exp()
    # A shard that the teacher never predicts has -inf here, and a sum of 0.
    shift = (teacher_down - down).masked_fill(stats.teacher_total == 0, 0.0) / temperature
    cross = weight * (stats.cross + stats.teacher_total * shift)
    return (
        stats.total * down.exp(),
        stats.chosen,
        stats.soft * soft,
        stats.teacher_total * weight,
        cross,
        stats.others * soft,
    )


def losses_of(stats: Stats, rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross entropy and divergence, in nats, from the vocabulary's numbers; [rows] each.

    ``rest`` is the probability of the bucket, None for a whole distribution.
    """
    entropy = stats.total.log() + (stats.top - stats.chosen)
    if rest is None:
        divergence = stats.cross / stats.teacher_total + (stats.soft.log() - stats.teacher_total.log())
    else:
        mass = stats.teacher_total + rest
        bucket = torch.where(rest > 0, rest * (rest.log() - stats.others.log()), 0.0)
        divergence = stats.cross + bucket + mass * stats.soft.log()
    return entropy, divergence


class Factors(NamedTuple):
    """Factors in a row's gradient: hard exp(l - top) + soft exp((l - top) / T) - teacher e - chosen at y.

    ``others`` takes the place of ``soft`` outside the k largest; [rows] each.
    """

    hard: Tensor
    soft: Tensor
    teacher: Tensor
    chosen: Tensor
    others: Tensor


def factors_of(
    stats: Stats,
    rest: Tensor | None,
    temperature: float,
    grad: Tensor,
    teacher_grad: Tensor,
    z_loss: float = 0.0,
) -> Factors:
    """From the vocabulary's numbers, the gradients of both losses, and the coefficient of z^2."""
    pull = teacher_grad / temperature
    hard = grad / stats.total
    if z_loss:  # see cross_entropy.py
        hard = hard * (1 + 2 * z_loss * (stats.top + stats.total.log()))
    if rest is None:
        return Factors(hard, pull / stats.soft, pull / stats.teacher_total, grad, pull / stats.soft)
    soft = pull * (stats.teacher_total + rest) / stats.soft
    share = torch.where(rest > 0, rest / stats.others, 0.0)
    return Factors(hard, soft, pull, grad, soft - pull * share)


def distillation_grad_(
    logits: Tensor,
    target: Tensor,
    targets: TeacherTargets,
    first: int,
    stats: Stats,
    factors: Factors,
    width: int | None = None,
) -> Tensor:
    """Overwrites logits [rows, v] with the gradient of both losses, one pass; returns them.

    ``stats`` are those of the whole vocabulary. Columns from ``width`` on become 0.
    """
    width = logits.size(1) if width is None else width
    if isinstance(targets, WholeTargets):
        temperature = targets.temperature
        row = _row_of(stats, factors, factors.soft)
        return shard_grad_(logits, target, targets.logits, temperature, first, row, width)
    row, column, rank = _place(targets, first, width)
    x = logits[row, column].to(stats.top.dtype) - stats.top[row]
    gradient = x.exp() * factors.hard[row] + (x / targets.temperature).exp() * factors.soft[row]
    gradient -= factors.teacher[row] * targets.logprobs.to(x.dtype)[row, rank].exp()
    gradient -= factors.chosen[row] * (column + first == target[row])
    rows = _row_of(stats, factors, factors.others)
    shard_grad_(logits, target, None, targets.temperature, first, rows, width)
    logits[row, column] = gradient.to(logits.dtype)
    return logits


def _row_of(stats: Stats, factors: Factors, soft: Tensor) -> Tensor:
    """The factors of each row as the kernels take them, [6, rows]."""
    row = (stats.top, stats.teacher_top, factors.hard, soft, factors.teacher, factors.chosen)
    return torch.stack([values.to(stats.top.dtype) for values in row])


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        targets: TeacherTargets,
        first: int,
        group: Group,
        width: int,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        flat = logits.detach().reshape(-1, logits.size(-1)).contiguous()
        target = target.reshape(-1).contiguous()
        targets, rest = _flat(targets)
        found = distillation_stats(flat, target, targets, first, width)
        stats = combine_stats(found, targets.temperature, group)
        rest = None if rest is None else rest.to(stats.top.dtype)
        ctx.logits, ctx.shape, ctx.first, ctx.width = flat, logits.shape, first, width
        ctx.target, ctx.targets, ctx.stats, ctx.rest, ctx.z_loss = target, targets, stats, rest, z_loss
        entropy, divergence = losses_of(stats, rest)
        return entropy.view(logits.shape[:-1]), divergence.view(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, teacher_grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.logits is None:
            raise RuntimeError(
                "vocab_parallel_distillation: backward ran twice, but its first run used the logits up"
            )
        logits, targets, ctx.logits = ctx.logits, ctx.targets, None
        grads = grad.reshape(-1), teacher_grad.reshape(-1)
        factors = factors_of(ctx.stats, ctx.rest, targets.temperature, *grads, ctx.z_loss)
        distillation_grad_(logits, ctx.target, targets, ctx.first, ctx.stats, factors, ctx.width)
        ctx.targets = ctx.stats = None
        return logits.view(ctx.shape), None, None, None, None, None, None


def _flat(targets: TeacherTargets) -> tuple[TeacherTargets, Tensor | None]:
    """One row a token, and the bucket's probability if there is a bucket."""
    if isinstance(targets, WholeTargets):
        logits = targets.logits.detach()
        return WholeTargets(logits.reshape(-1, logits.size(-1)).contiguous(), targets.temperature), None
    k, rest = targets.ids.size(-1), targets.rest.reshape(-1)
    ids, logprobs = targets.ids.reshape(-1, k), targets.logprobs.reshape(-1, k)
    return TopTargets(ids, logprobs, rest, targets.temperature), rest


def vocab_parallel_distillation(
    logits: Tensor,
    target: Tensor,
    targets: TeacherTargets,
    first: int = 0,
    group: Group = None,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross entropy and KL(teacher || student) per token, in nats, as the head of this file defines them.

    **Uses the logits up**: backward overwrites them with their gradient, so nothing else may need their
    values by then, and it can run only once.

    Args:
        logits: [..., v], this rank's columns, which begin at ``first`` in the vocabulary.
        target: [...], int64, over the whole vocabulary.
        targets: the teacher's, for the same tokens.
        group: the tensor parallel group; None for a vocabulary in one piece.
        vocab_size: columns of the whole vocabulary that take part; None for all.
        z_loss: c of the auxiliary loss c z^2 with z = log(sum_j exp l_j), which belongs to the cross entropy.
            It is in the gradient alone.
    Returns:
        [...] each, float32 (float64 for float64 logits).
    """
    width = width_of_shard(logits.size(-1), first, vocab_size)
    return _Distillation.apply(logits, target, targets, first, group, width, z_loss)
