"""Series activation on the SwiGLU gate as Triton kernels, for GPUs. Imported on first use only.

The same formula and the same arithmetic (float32) as the CPU kernels: forward is one pass over
memory, backward computes the n terms again from x. Each backward program owns a block of columns and
a range of rows and sums its share of the parameters' gradients; the shares are added in order, so
that the result is the same from run to run.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.kernels.launch import launch
from megatron_ext.kernels.triton_language import blocks, jit, power_of_2, tl

# Shapes: BLOCK columns of f, TERMS = n rounded up to a power of two (Triton's tiles ask for it);
# the rows that n does not fill are masked to z = 0, which adds nothing.


@jit
@no_type_check
def _parameters(a, b, column, n, f, TERMS: tl.constexpr):
    term = tl.arange(0, TERMS)[:, None]
    real = (term < n) & (column < f)[None, :]
    at = term * f + column[None, :]
    scale = tl.load(a + at, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(b + at, mask=real, other=0.0).to(tl.float32)
    return at, real, scale, bias  # [TERMS, BLOCK] each


@jit
@no_type_check
def _forward_kernel(x, a, b, y, rows, n, f, ROWS: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, real, scale, bias = _parameters(a, b, column, n, f, TERMS)
    inside = column < f
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        gate = tl.load(x + row * 2 * f + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * f + f + column, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(real, scale * gate[None, :] + bias, 0.0)
        total = tl.sum(z * tl.sigmoid(z), axis=0)
        tl.store(y + row * f + column, (total * up).to(y.dtype.element_ty), mask=inside)


@jit
@no_type_check
def _backward_kernel(
    x, a, b, dy, dx, sums, rows, n, f, ROWS: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, real, scale, bias = _parameters(a, b, column, n, f, TERMS)
    inside = column < f
    first = tl.program_id(0).to(tl.int64) * ROWS
    da = tl.zeros([TERMS, BLOCK], tl.float32)
    db = tl.zeros([TERMS, BLOCK], tl.float32)
    for row in range(first, tl.minimum(first + ROWS, rows)):
        gate = tl.load(x + row * 2 * f + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * f + f + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * f + column, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(real, scale * gate[None, :] + bias, 0.0)
        s = tl.sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
        gate_grad = grad * up
        d_gate = gate_grad * tl.sum(scale * slope, axis=0)
        d_up = grad * tl.sum(z * s, axis=0)
        q = gate_grad[None, :] * slope
        da += q * gate[None, :]
        db += q
        tl.store(dx + row * 2 * f + column, d_gate.to(dx.dtype.element_ty), mask=inside)
        tl.store(dx + row * 2 * f + f + column, d_up.to(dx.dtype.element_ty), mask=inside)
    share = sums + tl.program_id(0).to(tl.int64) * 2 * n * f  # [blocks of rows, 2, n, f]
    tl.store(share + at, da, mask=real)
    tl.store(share + n * f + at, db, mask=real)


_FORWARD_ROWS = 4
_BACKWARD_ROWS = 64


def _launch(rows: int, f: int, n: int, rows_a_program: int) -> tuple[tuple[int, int], dict[str, int]]:
    terms = power_of_2(n)
    block = 1024 if terms <= 4 else 256  # 16 bytes a load of bfloat16, unless the sums fill the registers
    grid = (blocks(rows, rows_a_program), blocks(f, block))
    return grid, dict(ROWS=rows_a_program, TERMS=terms, BLOCK=block)


class _SeriesSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        x, scale, bias = x.contiguous(), scale.contiguous(), bias.contiguous()
        n, f = scale.shape
        rows = x.numel() // (2 * f)
        y = x.new_empty(*x.shape[:-1], f)
        if rows:
            grid, constants = _launch(rows, f, n, _FORWARD_ROWS)
            arguments = (x, scale, bias, y, rows, n, f)
            launch(_forward_kernel, grid, arguments, (x, scale, bias), (y,), **constants)
        ctx.save_for_backward(x, scale, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, bias = ctx.saved_tensors
        n, f = scale.shape
        rows, dx = x.numel() // (2 * f), torch.empty_like(x)
        if not rows:
            return dx, torch.zeros_like(scale), torch.zeros_like(bias)
        grid, constants = _launch(rows, f, n, _BACKWARD_ROWS)
        sums = torch.empty(grid[0], 2, n, f, dtype=torch.float32, device=x.device)
        grad = grad.contiguous()
        arguments = (x, scale, bias, grad, dx, sums, rows, n, f)
        launch(_backward_kernel, grid, arguments, (x, scale, bias, grad), (dx, sums), **constants)
        da, db = sums.sum(dim=0)
        return dx, da.to(scale.dtype), db.to(bias.dtype)


def series_swiglu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """sum_i silu(scale_i * gate + bias_i) * up; see :func:`megatron_ext.kernels.fused.series_swiglu`."""
    return _SeriesSwiGLU.apply(x, scale, bias)
