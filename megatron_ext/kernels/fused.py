"""Fused element-wise operators of the training step, each beside its formula in plain PyTorch.

On a CPU they run in the C++ extension ``megatron_ext._kernels``: forward and backward are one pass
over memory each, arithmetic in float32, storage in float32 or bfloat16. On a GPU those that torch does
not fuse itself run in Triton, where it is installed (``launch.py``). The ``*_reference`` functions are
the formulas as they stand, used elsewhere and for other dtypes. Gradients are the same functions of the
same tensors either way. docs/kernels.md has the numerics.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.kernels import launch

#: Raised with every change of the extension's functions; kAbi in csrc/kernels.cpp.
_ABI = 4

try:
    from megatron_ext import _kernels  # type: ignore[attr-defined]  # compiled
except ImportError:  # not built: no compiler at installation
    _kernels = None
if _kernels is not None and getattr(_kernels, "ABI", None) != _ABI:
    logging.getLogger(__name__).warning(
        "the compiled kernels are of another version and not used; build them: bash tools/setup.sh"
    )
    _kernels = None

#: On a GPU, since torch 2.9; before it F.rms_norm is eight operators, most of them on float32 copies.
_TORCH_FUSES_RMS_NORM = hasattr(torch.ops.aten, "_fused_rms_norm")
_STORAGE = (torch.float32, torch.bfloat16)


def available() -> bool:
    """Whether the C++ kernels were built."""
    return _kernels is not None


def supports(*tensors: Tensor | None) -> bool:
    """Whether the C++ kernels can take these: on the CPU, all float32 or all bfloat16."""
    given = [t for t in tensors if t is not None]
    dtype = given[0].dtype
    return (
        _kernels is not None
        and dtype in _STORAGE
        and all(t.device.type == "cpu" and t.dtype == dtype for t in given)
    )


def _is_bf16(t: Tensor) -> bool:
    return t.dtype == torch.bfloat16


def _flat(t: Tensor) -> Tensor:
    return t.detach().contiguous()


def _float(t: Tensor) -> Tensor:
    """A parameter as the kernels read it: contiguous float32."""
    return t.detach().float().contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


# ------------------------------------------------------------------------------ series activation


def swiglu_reference(x: Tensor) -> Tensor:
    """silu(gate) * up in plain PyTorch; see :func:`swiglu`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def series_swiglu_reference(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """sum_i silu(scale_i * gate + bias_i) * up in plain PyTorch; see :func:`series_swiglu`."""
    gate, up = x.chunk(2, dim=-1)
    return sum(F.silu(a * gate + b) for a, b in zip(scale, bias, strict=True)) * up


class _SeriesSwiGLU(torch.autograd.Function):
    """Saves x alone; the n terms are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        x = _flat(x)
        f = x.size(-1) // 2
        terms = 0 if scale is None else scale.size(0)
        y = x.new_empty(*x.shape[:-1], f)
        a, b = (None, None) if scale is None else (_float(scale), _float(bias))
        rows = y.numel() // max(f, 1)
        threads = torch.get_num_threads()
        _kernels.series_forward(
            _is_bf16(x), x.data_ptr(), _address(a), _address(b), y.data_ptr(), rows, f, terms, threads
        )
        ctx.save_for_backward(x, scale, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, bias = ctx.saved_tensors
        grad = _flat(grad)
        f = grad.size(-1)
        terms = 0 if scale is None else scale.size(0)
        dx = torch.empty_like(x)
        a, b = (None, None) if scale is None else (_float(scale), _float(bias))
        da, db = (None, None) if scale is None else (torch.empty_like(a), torch.empty_like(b))
        inputs = [_address(t) for t in (x, a, b, grad, dx, da, db)]
        rows = grad.numel() // max(f, 1)
        _kernels.series_backward(_is_bf16(x), *inputs, rows, f, terms, torch.get_num_threads())
        return dx, *(None if d is None else d.to(scale.dtype) for d in (da, db))


def series_swiglu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """PanGu-pi's series activation on the SwiGLU gate: sum_i silu(scale_i * gate + bias_i) * up.

    Source: arXiv 2312.17276, section 4.1.

    Args:
        x: [..., 2 * f], gate in the first half and up projection in the second (``linear_fc1``).
        scale, bias: [n, f], n >= 1; of any floating dtype.
    Returns:
        [..., f] in the dtype of ``x``.
    Raises:
        ValueError: the shapes do not fit together.
    """
    if scale.shape != bias.shape or scale.dim() != 2 or 2 * scale.size(1) != x.size(-1) or not scale.size(0):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, scale, bias))
        raise ValueError(f"series_swiglu needs x [..., 2 f] and scale, bias [n, f]; got {shapes}")
    if supports(x) and all(t.device.type == "cpu" and t.dtype in _STORAGE for t in (scale, bias)):
        return _SeriesSwiGLU.apply(x, scale, bias)
    if launch.supports(x, scale, bias):
        from megatron_ext.kernels import triton_activation

        return triton_activation.series_swiglu(x, scale, bias)
    return series_swiglu_reference(x, scale, bias)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up. x: [..., 2 * f], gate in the first half -> [..., f]."""
    return _SeriesSwiGLU.apply(x, None, None) if supports(x) else swiglu_reference(x)


# ---------------------------------------------------------------------------------------- RMSNorm


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in plain PyTorch; see :func:`rms_norm`."""
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Saves x and one number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = _flat(x)
        y, h = torch.empty_like(x), x.size(-1)
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
        w = _float(weight)
        tensors = [_address(t) for t in (x, w, y, rstd)]
        _kernels.rms_norm_forward(_is_bf16(x), *tensors, rstd.numel(), h, eps, torch.get_num_threads())
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        w, dy = _float(weight), _flat(dy)
        dx, dw = torch.empty_like(x), torch.empty_like(w)
        tensors = [_address(t) for t in (dy, x, w, rstd, dx, dw)]
        _kernels.rms_norm_backward(_is_bf16(x), *tensors, rstd.numel(), x.size(-1), torch.get_num_threads())
        return dx, dw.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: [..., h], weight: [h]."""
    if supports(x) and supports(weight):
        return _RMSNorm.apply(x, weight, eps)
    if not _TORCH_FUSES_RMS_NORM and launch.supports(x, weight):
        from megatron_ext.kernels import triton_norm

        if x.size(-1) <= triton_norm.WIDEST:
            return triton_norm.rms_norm(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


# ------------------------------------------------------------------------------- rotary embedding


def apply_rope_reference(t: Tensor, freqs: Tensor) -> Tensor:
    """Rotary embedding in plain PyTorch; see :func:`apply_rope`."""
    rotated, rest = t.split((freqs.size(-1), t.size(-1) - freqs.size(-1)), dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    cosine, sine = freqs.cos().to(t.dtype), freqs.sin().to(t.dtype)
    return torch.cat((rotated * cosine + torch.cat((-second, first), dim=-1) * sine, rest), dim=-1)


_tables: tuple[Tensor, Tensor, Tensor] | None = None  # the last angles, their cosines, their sines


def _cosine_and_sine(freqs: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles; Megatron-Core hands every layer of a step the same tensor."""
    global _tables
    if _tables is None or _tables[0] is not freqs:
        angles = freqs.detach().float().contiguous()
        _tables = (freqs, angles.cos(), angles.sin())
    return _tables[1:]


def _rotate(t: Tensor, tables: tuple[Tensor, Tensor], out: Tensor, transpose: bool) -> Tensor:
    cosine, sine = tables
    strides = (t.stride()[:3], out.stride()[:3])
    addresses = (t.data_ptr(), cosine.data_ptr(), sine.data_ptr(), out.data_ptr())
    _kernels.rope(
        _is_bf16(t), *addresses, t.shape, cosine.size(-1), *strides, transpose, torch.get_num_threads()
    )
    return out


class _RoPE(torch.autograd.Function):
    """Reads strided views (the slices of a joint QKV projection) without copying them first."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, freqs: Tensor, inplace: bool) -> Tensor:
        ctx.tables = _cosine_and_sine(freqs)
        if inplace:
            ctx.mark_dirty(t)
            return _rotate(t, ctx.tables, t, False)
        t = t if t.stride(-1) == 1 else t.contiguous()
        return _rotate(t, ctx.tables, torch.empty(t.shape, dtype=t.dtype), False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return _rotate(grad, ctx.tables, torch.empty(grad.shape, dtype=grad.dtype), True), None, None


def apply_rope(t: Tensor, freqs: Tensor, *, inplace: bool = False) -> Tensor:
    """Rotary position embedding, halves rotated (GPT-NeoX; Megatron's ``rotary_interleaved`` off).

    Args:
        t: [s, b, n, d], any strides.
        freqs: angles [s, 1, 1, rot], rot <= d and even; channels past ``rot`` pass unchanged. No
            gradient flows to them, and they must not be changed in place.
        inplace: overwrite ``t`` (last stride 1) and return it.
    Returns:
        [s, b, n, d] in the dtype of ``t``.
    Raises:
        ValueError: the shapes do not fit together.
    """
    rot = freqs.size(-1)
    if t.dim() != 4 or freqs.shape != (t.size(0), 1, 1, rot) or rot > t.size(3) or rot % 2:
        shapes = f"{tuple(t.shape)} and {tuple(freqs.shape)}"
        raise ValueError(f"apply_rope needs t [s, b, n, d] and freqs [s, 1, 1, even rot <= d]; got {shapes}")
    if supports(t) and not (inplace and t.stride(-1) != 1):
        return _RoPE.apply(t, freqs, inplace)
    if launch.supports(t) and not (inplace and t.stride(-1) != 1):
        from megatron_ext.kernels import triton_rope

        return triton_rope.apply_rope(t, freqs, inplace=inplace)
    result = apply_rope_reference(t, freqs)
    return t.copy_(result) if inplace else result
