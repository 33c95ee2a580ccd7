"""Cross entropy over a vocabulary split among tensor parallel ranks, without a float32 copy of it.

Megatron-Core turns the logits into float32 and keeps their softmax; here the logits themselves are
kept, in their own dtype, and become their own gradient in backward.

The vocabulary is padded with rows that stand for no token. ``width`` is the number of a shard's columns that
take part in the softmax: the logits of those behind it are read by nobody, and their gradient is 0.
"""

from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.kernels import fused, launch
from megatron_ext.kernels.fused import _is_bf16, _kernels

Group: TypeAlias = dist.ProcessGroup | None


def supports(logits: Tensor) -> bool:
    """Whether a kernel can take these: C++ on a CPU, Triton on a GPU."""
    return fused.supports(logits) or launch.supports(logits)


def width_of_shard(columns: int, first: int, vocab_size: int | None) -> int:
    """How many of the columns first .. first + ``columns`` lie below ``vocab_size``; all if it is None."""
    return columns if vocab_size is None else max(0, min(columns, vocab_size - first))


def mask_padding_(logits: Tensor, width: int) -> Tensor:
    """Overwrites the columns of logits [..., v] from ``width`` on, so that their softmax is 0; returns them.

    Autograd need not know: the gradient of a column whose softmax is 0 is 0, whatever it held before. The
    lowest number instead of -inf keeps a shard that is all padding from (-inf) - (-inf).
    """
    with torch.no_grad():
        logits[..., width:] = torch.finfo(logits.dtype).min
    return logits


def cross_entropy_stats_reference(
    logits: Tensor, target: Tensor, first: int = 0, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The pieces of :func:`cross_entropy_stats` in plain PyTorch."""
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    wide = wide.masked_fill(_padding(logits, width), -torch.inf)
    top = wide.amax(-1)
    total = (wide - top.masked_fill(top == -torch.inf, 0.0)[:, None]).exp().sum(-1)
    column, ours = _columns(logits, target, first)
    return top, total, wide.gather(1, column[:, None])[:, 0].masked_fill(~ours, 0.0)


def _padding(logits: Tensor, width: int | None) -> Tensor:
    """[v], True for the columns that take no part."""
    columns = logits.size(-1)
    return torch.arange(columns, device=logits.device) >= (columns if width is None else width)


def _columns(logits: Tensor, target: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The target's column in this shard (0 where it is another's), and whether it is here."""
    column = target - first
    ours = (column >= 0) & (column < logits.size(1))
    return column.masked_fill(~ours, 0), ours


def cross_entropy_stats(
    logits: Tensor, target: Tensor, first: int = 0, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a shard of the vocabulary knows of the loss, in one pass over it.

    Args:
        logits: [rows, v], columns first .. first + v of the vocabulary; contiguous.
        target: [rows], int64, over the whole vocabulary.
        width: columns that take part; None for all.
    Returns:
        top = max_j l_j, total = sum_j exp(l_j - top), and the target's logit, 0 where another shard
        has it, -inf where it is padding; [rows] each, float32 (float64 for float64 logits).
    """
    if not supports(logits):
        return cross_entropy_stats_reference(logits, target, first, width)
    rows, columns = logits.shape
    width = columns if width is None else width
    logits, target = logits.contiguous(), target.contiguous()
    if not fused.supports(logits):
        from megatron_ext.kernels import triton_cross_entropy

        return triton_cross_entropy.cross_entropy_stats(logits, target, first, width)
    stats = tuple(torch.empty(rows, dtype=torch.float32) for _ in range(3))
    addresses = (logits.data_ptr(), target.data_ptr(), first, *(t.data_ptr() for t in stats))
    sizes = rows, width, columns
    _kernels.cross_entropy_stats(_is_bf16(logits), *addresses, *sizes, torch.get_num_threads())
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
    logits: Tensor,
    target: Tensor,
    first: int,
    top: Tensor,
    total: Tensor,
    grad: Tensor,
    width: int | None = None,
) -> Tensor:
    """Overwrites logits [rows, v] with grad * (softmax - one_hot(target)), one pass; returns them.

    ``top`` and ``total`` are those of the whole vocabulary, ``grad`` the loss's gradient: [rows]. Columns
    from ``width`` on become 0.
    """
    if not supports(logits) or not logits.is_contiguous():
        column, ours = _columns(logits, target, first)
        wide = (logits.to(top.dtype) - top[:, None]).exp() * (grad / total)[:, None]
        wide[torch.arange(len(wide), device=wide.device), column] -= grad * ours
        return logits.copy_(wide.masked_fill_(_padding(logits, width), 0.0))
    rows, columns = logits.shape
    width = columns if width is None else width
    top, total, grad = (t.to(torch.float32).contiguous() for t in (top, total, grad))
    target = target.contiguous()
    torch.autograd.graph.increment_version(logits)  # written behind autograd's back
    if not fused.supports(logits):
        from megatron_ext.kernels import triton_cross_entropy

        return triton_cross_entropy.cross_entropy_grad_(logits, target, first, top, total, grad, width)
    addresses = (
        logits.data_ptr(),
        target.data_ptr(),
        first,
        *(t.data_ptr() for t in (top, total, grad)),
        logits.data_ptr(),
    )
    sizes = rows, width, columns
    _kernels.cross_entropy_grad(_is_bf16(logits), *addresses, *sizes, torch.get_num_threads())
    return logits


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, first: int, group: Group, width: int, z_loss: float
    ) -> Tensor:
        flat, target = logits.detach().reshape(-1, logits.size(-1)).contiguous(), target.reshape(-1)
        top, total, chosen = combine_stats(*cross_entropy_stats(flat, target, first, width), group)
        ctx.logits, ctx.shape, ctx.first, ctx.width = flat, logits.shape, first, width
        log_total = total.log()
        # The gradient of c z^2, z = log sum_j exp l_j, is 2 c z softmax: it makes the softmax larger.
        ctx.save_for_backward(target, top, total / (1 + 2 * z_loss * (top + log_total)) if z_loss else total)
        return (log_total + (top - chosen)).view(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.logits is None:
            raise RuntimeError(
                "vocab_parallel_cross_entropy: backward ran twice, but its first run used the logits up"
            )
        target, top, total = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        cross_entropy_grad_(logits, target, ctx.first, top, total, grad.reshape(-1), ctx.width)
        return logits.view(ctx.shape), None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    first: int = 0,
    group: Group = None,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """log(sum_j exp l_j) - l_target per token.

    **Uses the logits up**: backward overwrites them with their gradient, so nothing else may need
    their values by then, and it can run only once.

    Args:
        logits: [..., v], this rank's columns, which begin at ``first`` in the vocabulary.
        target: [...], int64, over the whole vocabulary.
        group: the tensor parallel group; None for a vocabulary in one piece.
        vocab_size: columns of the whole vocabulary that take part in the softmax; None for all.
        z_loss: c of the auxiliary loss c z^2 with z = log(sum_j exp l_j) (PaLM, arXiv 2204.02311, section 5).
            It is in the gradient alone: what is returned is the cross entropy.
    Returns:
        [...], float32 (float64 for float64 logits).
    """
    width = width_of_shard(logits.size(-1), first, vocab_size)
    return _VocabParallelCrossEntropy.apply(logits, target, first, group, width, z_loss)
