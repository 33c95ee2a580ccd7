"""Cross entropy and the divergence from a teacher's logits as two Triton kernels, for GPUs.

Each direction reads the logits of student and teacher once, in their own formats; backward writes the
gradient over the student's. What they compute is said in ``distillation.py``, whose functions call these.
"""

from typing import no_type_check

import torch
from torch import Tensor

from megatron_ext.kernels.launch import launch
from megatron_ext.kernels.triton_language import blocks, jit, power_of_2, tl, warps


@jit
@no_type_check
def _moved(high, base):
    """From a maximum, -inf for none yet, to a larger one."""
    return tl.where(high == float("-inf"), 0.0, high - base)


@jit
@no_type_check
def _both_stats_kernel(
    logits, target, teacher, stats, inverse, first, rows, width, columns,
    BLOCK: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """One row: running maxima and sums in each of BLOCK lanes, joined at the end."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    teacher += row * columns
    lane = tl.arange(0, BLOCK)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    high_u = tl.full([BLOCK], float("-inf"), tl.float32)
    mass, soft = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    mass_u, cross = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        inside = begin + lane < width
        value = tl.load(logits + begin + lane, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(high, value)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # not (-inf) - (-inf)
        mass = mass * tl.exp(high - base) + tl.exp(value - base)
        soft = soft * tl.exp((high - base) * inverse) + tl.exp((value - base) * inverse)
        if TEACHER:
            u = tl.load(teacher + begin + lane, mask=inside, other=float("-inf")).to(tl.float32)
            higher_u = tl.maximum(high_u, u)
            base_u = tl.where(higher_u == float("-inf"), 0.0, higher_u)
            shift = (_moved(high_u, base_u) - _moved(high, base)) * inverse
            down, e = tl.exp((high_u - base_u) * inverse), tl.exp((u - base_u) * inverse)
            distance = ((u - base_u) - (value - base)) * inverse
            cross = down * (cross + mass_u * shift) + tl.where(e == 0.0, 0.0, e * distance)
            mass_u = mass_u * down + e
            high_u = higher_u
        high = higher
    best = tl.max(high, axis=0)
    base = tl.where(best == float("-inf"), 0.0, best)
    tl.store(stats + row, best)
    tl.store(stats + rows + row, tl.sum(mass * tl.exp(high - base), axis=0))
    tl.store(stats + 3 * rows + row, tl.sum(soft * tl.exp((high - base) * inverse), axis=0))
    wanted = tl.load(target + row) - first
    ours = (wanted >= 0) & (wanted < columns)
    value = tl.load(logits + wanted, mask=ours & (wanted < width), other=float("-inf")).to(tl.float32)
    tl.store(stats + 2 * rows + row, tl.where(ours, value, 0.0))
    if TEACHER:
        best_u = tl.max(high_u, axis=0)
        base_u = tl.where(best_u == float("-inf"), 0.0, best_u)
        down = tl.exp((high_u - base_u) * inverse)
        shift = (_moved(high_u, base_u) - _moved(high, base)) * inverse
        tl.store(stats + 4 * rows + row, best_u)
        tl.store(stats + 5 * rows + row, tl.sum(mass_u * down, axis=0))
        tl.store(stats + 6 * rows + row, tl.sum(down * (cross + mass_u * shift), axis=0))


@jit
@no_type_check
def _both_grad_kernel(
    logits, target, teacher, factors, inverse, first, rows, width, columns,
    BLOCK: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row, 0 from ``width`` on; ``factors`` [6, rows] as in distillation.py."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(logits + row * columns + column, mask=inside, other=0.0).to(tl.float32) - tl.load(
        factors + row
    )
    hard, soft = tl.load(factors + 2 * rows + row), tl.load(factors + 3 * rows + row)
    result = tl.exp(x) * hard + tl.exp(x * inverse) * soft
    if TEACHER:
        u = tl.load(teacher + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        high_u, pull = tl.load(factors + rows + row), tl.load(factors + 4 * rows + row)
        result -= tl.exp((u - high_u) * inverse) * pull
    wanted = tl.load(target + row) - first
    result = tl.where(column == wanted, result - tl.load(factors + 5 * rows + row), result)
    result = tl.where(inside, result, 0.0)
    tl.store(logits + row * columns + column, result.to(logits.dtype.element_ty), mask=column < columns)


_STATS_BLOCK, _GRAD_BLOCK = 2048, 4096


def stats(
    logits: Tensor, target: Tensor, teacher: Tensor | None, temperature: float, first: int, width: int
) -> tuple[Tensor, ...]:
    """Seven vectors [rows], see ``distillation.Stats``; the last three are 0 without a teacher."""
    rows, columns = logits.shape
    block = min(_STATS_BLOCK, power_of_2(max(width, 1)))
    found = torch.zeros(7, rows, dtype=torch.float32, device=logits.device)
    if rows:
        launch(
            _both_stats_kernel,
            (rows,),
            (logits, target, logits if teacher is None else teacher, found)
            + (1.0 / temperature, first, rows, width, columns),
            reads=(logits[:, :width], target, *([] if teacher is None else [teacher[:, :width]])),
            writes=(found[: 4 if teacher is None else 7],),
            BLOCK=block,
            TEACHER=teacher is not None,
            num_warps=warps(block),
        )
    return tuple(found)


def grad_(
    logits: Tensor,
    target: Tensor,
    teacher: Tensor | None,
    temperature: float,
    first: int,
    factors: Tensor,
    width: int,
) -> Tensor:
    """Overwrites logits with their gradient; ``factors`` [6, rows] float32, all contiguous."""
    rows, columns = logits.shape
    block = min(_GRAD_BLOCK, power_of_2(max(columns, 1)))
    if logits.numel():
        used = (factors[0], factors[2:4], factors[5]) if teacher is None else (factors, teacher[:, :width])
        launch(
            _both_grad_kernel,
            (rows, blocks(columns, block)),
            (logits, target, logits if teacher is None else teacher, factors)
            + (1.0 / temperature, first, rows, width, columns),
            reads=(logits[:, :width], target, *used),
            writes=(logits,),
            BLOCK=block,
            TEACHER=teacher is not None,
            num_warps=warps(block),
        )
    return logits
