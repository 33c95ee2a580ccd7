"""Cross entropy over a vocabulary split among tensor parallel ranks, without a float32 copy of it.

Megatron-Core turns the logits into float32 and keeps their softmax; here the logits themselves are
kept, in their own dtype, and become their own gradient in backward.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.models.fused import _is_bf16, _kernels, takes

Group = dist.ProcessGroup | None


def cross_entropy_stats_reference(
    logits: Tensor, target: Tensor, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The pieces of :func:`cross_entropy_stats` in plain PyTorch."""
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    top = wide.amax(-1)
    total = (wide - top.masked_fill(top == -torch.inf, 0.0)[:, None]).exp().sum(-1)
    column, ours = _columns(logits, target, first)
    return top, total, wide.gather(1, column[:, None])[:, 0].masked_fill(~ours, 0.0)


def _columns(logits: Tensor, target: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The target's column in this shard (0 where it is another's), and whether it is here."""
    column = target - first
    ours = (column >= 0) & (column < logits.size(1))
    return column.masked_fill(~ours, 0), ours


def cross_entropy_stats(logits: Tensor, target: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What a shard of the vocabulary knows of the loss, in one pass over it.

    Args:
        logits: [rows, v], columns first .. first + v of the vocabulary; contiguous.
        target: [rows], int64, over the whole vocabulary.
    Returns:
        top = max_j l_j, total = sum_j exp(l_j - top), and the target's logit, 0 where another shard
        has it; [rows] each, float32 (float64 for float64 logits).
    """
    if not takes(logits):
        return cross_entropy_stats_reference(logits, target, first)
    rows, columns = logits.shape
    logits, target = logits.contiguous(), target.contiguous()
    stats = tuple(torch.empty(rows, dtype=torch.float32) for _ in range(3))
    addresses = (logits.data_ptr(), target.data_ptr(), first, *(t.data_ptr() for t in stats))
    _kernels.cross_entropy_forward(_is_bf16(logits), *addresses, rows, columns, torch.get_num_threads())
    return stats


def combine_stats(
    top: Tensor, total: Tensor, chosen: Tensor, group: Group = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same three numbers over the whole vocabulary: two all-reduces of [rows] over ``group``."""
    if group is None or group.size() == 1:
        return top, total, chosen
    highest = top.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack((total * (top - highest).exp(), chosen))
    dist.all_reduce(sums, group=group)
    return highest, sums[0], sums[1]


def cross_entropy_grad_(
    logits: Tensor, target: Tensor, first: int, top: Tensor, total: Tensor, grad: Tensor
) -> Tensor:
    """Overwrites logits [rows, v] with grad * (softmax - one_hot(target)), one pass; returns them.

    ``top`` and ``total`` are those of the whole vocabulary, ``grad`` the loss's gradient: [rows].
    """
    if not takes(logits) or not logits.is_contiguous():
        column, ours = _columns(logits, target, first)
        wide = (logits.to(top.dtype) - top[:, None]).exp() * (grad / total)[:, None]
        wide[torch.arange(len(wide), device=wide.device), column] -= grad * ours
        return logits.copy_(wide)
    rows, columns = logits.shape
    vectors = [t.to(torch.float32).contiguous() for t in (top, total, grad)]
    target = target.contiguous()
    addresses = (
        logits.data_ptr(),
        target.data_ptr(),
        first,
        *(t.data_ptr() for t in vectors),
        logits.data_ptr(),
    )
    _kernels.cross_entropy_backward(_is_bf16(logits), *addresses, rows, columns, torch.get_num_threads())
    torch.autograd.graph.increment_version(logits)  # written behind autograd's back
    return logits


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, first: int, group: Group) -> Tensor:
        flat, target = logits.detach().reshape(-1, logits.size(-1)).contiguous(), target.reshape(-1)
        top, total, chosen = combine_stats(*cross_entropy_stats(flat, target, first), group)
        ctx.logits, ctx.shape, ctx.first = flat, logits.shape, first
        ctx.save_for_backward(target, top, total)
        return (total.log() + (top - chosen)).view(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.logits is None:
            raise RuntimeError(
                "vocab_parallel_cross_entropy: backward ran twice, but its first run used the logits up"
            )
        target, top, total = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        cross_entropy_grad_(logits, target, ctx.first, top, total, grad.reshape(-1))
        return logits.view(ctx.shape), None, None, None


def vocab_parallel_cross_entropy_reference(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of one whole vocabulary in plain PyTorch."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = torch.nn.functional.cross_entropy(wide.flatten(0, -2), target.flatten(), reduction="none")
    return loss.view(target.shape)


def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, first: int = 0, group: Group = None
) -> Tensor:
    """log(sum_j exp l_j) - l_target per token.

    **Uses the logits up**: backward overwrites them with their gradient, so nothing else may need
    their values by then, and it can run only once.

    Args:
        logits: [..., v], this rank's columns, which begin at ``first`` in the vocabulary.
        target: [...], int64, over the whole vocabulary.
        group: the tensor parallel group; None for a vocabulary in one piece.
    Returns:
        [...], float32 (float64 for float64 logits).
    """
    return _VocabParallelCrossEntropy.apply(logits, target, first, group)
