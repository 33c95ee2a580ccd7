"""RMSNorm as one Triton kernel each way, for GPUs whose torch has no fused one (before 2.9).

Backward programs own a range of rows each and sum their share of the weight's gradient, as those of
``triton_activation.py`` do, so x and dy are read once.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.kernels.launch import launch
from megatron_ext.kernels.triton_language import blocks, jit, power_of_2, tl, warps

#: The widest row that a program holds at once.
WIDEST = 16384


@jit
@no_type_check
def _norm_forward_kernel(x, weight, y, rstd, h, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < h
    value = tl.load(x + row * h + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / h + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * h + column, (value * scale * w).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale)


@jit
@no_type_check
def _norm_backward_kernel(
    x, weight, rstd, dy, dx, sums, rows, h, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < h
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        scale = tl.load(rstd + row)
        normed = tl.load(x + row * h + column, mask=inside, other=0.0).to(tl.float32) * scale
        grad = tl.load(dy + row * h + column, mask=inside, other=0.0).to(tl.float32)
        dw += grad * normed
        grad *= w
        result = scale * (grad - normed * (tl.sum(grad * normed, axis=0) / h))
        tl.store(dx + row * h + column, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * h + column, dw, mask=inside)


_BACKWARD_ROWS = 32


def _constants(h: int) -> dict[str, int]:
    block = power_of_2(h)
    return {"BLOCK": block, "num_warps": warps(block)}


class _RMSNorm(torch.autograd.Function):
    """Saves x and one number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight, h = x.contiguous(), weight.contiguous(), x.size(-1)
        y = torch.empty_like(x)
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        if rstd.numel():
            arguments = (x, weight, y, rstd, h, eps)
            constants = _constants(h)
            launch(_norm_forward_kernel, (rstd.numel(),), arguments, (x, weight), (y, rstd), **constants)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy, dx, rows, h = dy.contiguous(), torch.empty_like(x), rstd.numel(), x.size(-1)
        if not rows:
            return dx, torch.zeros_like(weight), None
        grid = (blocks(rows, _BACKWARD_ROWS),)
        sums = torch.empty(grid[0], h, dtype=torch.float32, device=x.device)
        arguments = (x, weight, rstd, dy, dx, sums, rows, h)
        constants = dict(ROWS=_BACKWARD_ROWS, **_constants(h))
        launch(_norm_backward_kernel, grid, arguments, (x, weight, rstd, dy), (dx, sums), **constants)
        return dx, sums.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`megatron_ext.kernels.fused.rms_norm`; rows of at most ``WIDEST``."""
    return _RMSNorm.apply(x, weight, eps)
