"""Cross entropy over a shard of the vocabulary as two Triton kernels, for GPUs.

Each direction reads the logits once, in their own format; backward writes the gradient over them. What they
compute and how shards are joined is said in ``cross_entropy.py``, whose functions call these.
"""

from typing import no_type_check

import torch
from torch import Tensor

from megatron_ext.kernels.launch import launch
from megatron_ext.kernels.triton_language import blocks, jit, power_of_2, tl, warps


@jit
@no_type_check
def _stats_kernel(logits, target, top, total, chosen, first, width, columns, BLOCK: tl.constexpr):
    """One row: a running maximum and sum of exponentials in each of BLOCK lanes, joined at the end."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    lane = tl.arange(0, BLOCK)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + lane
        value = tl.load(logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(high, value)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # not (-inf) - (-inf)
        mass = mass * tl.exp(high - base) + tl.exp(value - base)
        high = higher
    best = tl.max(high, axis=0)
    base = tl.where(best == float("-inf"), 0.0, best)
    tl.store(top + row, best)
    tl.store(total + row, tl.sum(mass * tl.exp(high - base), axis=0))
    wanted = tl.load(target + row) - first
    ours = (wanted >= 0) & (wanted < columns)
    value = tl.load(logits + wanted, mask=ours & (wanted < width), other=float("-inf")).to(tl.float32)
    tl.store(chosen + row, tl.where(ours, value, 0.0))


@jit
@no_type_check
def _grad_kernel(logits, target, top, total, grad, first, width, columns, BLOCK: tl.constexpr):
    """BLOCK columns of one row: grad * (softmax - one_hot), 0 from ``width`` on."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * columns
    value = tl.load(logits + column, mask=column < width, other=0.0).to(tl.float32)
    slope = tl.load(grad + row)
    soft = tl.exp(value - tl.load(top + row)) * (slope / tl.load(total + row))
    wanted = tl.load(target + row) - first
    result = tl.where(column == wanted, soft - slope, soft)
    result = tl.where(column < width, result, 0.0)
    tl.store(logits + column, result.to(logits.dtype.element_ty), mask=column < columns)


_BLOCK = 4096


def cross_entropy_stats(
    logits: Tensor, target: Tensor, first: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`megatron_ext.kernels.cross_entropy.cross_entropy_stats`; logits and target contiguous."""
    rows, columns = logits.shape
    block = min(_BLOCK, power_of_2(max(width, 1)))
    stats = tuple(torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    if rows:
        launch(
            _stats_kernel,
            (rows,),
            (logits, target, *stats, first, width, columns),
            reads=(logits[:, :width], target),
            writes=stats,
            BLOCK=block,
            num_warps=warps(block),
        )
    return stats


def cross_entropy_grad_(
    logits: Tensor, target: Tensor, first: int, top: Tensor, total: Tensor, grad: Tensor, width: int
) -> Tensor:
    """See :func:`megatron_ext.kernels.cross_entropy.cross_entropy_grad_`; all contiguous, vectors float32."""
    rows, columns = logits.shape
    block = min(_BLOCK, power_of_2(max(columns, 1)))
    if logits.numel():
        launch(
            _grad_kernel,
            (rows, blocks(columns, block)),
            (logits, target, top, total, grad, first, width, columns),
            reads=(logits[:, :width], target, top, total, grad),
            writes=(logits,),
            BLOCK=block,
            num_warps=warps(block),
        )
    return logits
