"""The few functions of Transformer Engine's C++ module that a step in fp32 or bf16 needs, in torch.

Their arguments are those of `transformer_engine/pytorch/csrc/extensions.h` of 2.9 to 2.11.
"""

import enum
import math

import torch
from torch import Tensor


class DType(enum.IntEnum):
    """Number formats, with the C++ enumeration's values (transformer_engine.h)."""

    kByte = 0
    kInt16 = 1
    kInt32 = 2
    kInt64 = 3
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat8E8M0 = 9
    kFloat4E2M1 = 10


_TORCH = {DType.kFloat32: torch.float32, DType.kFloat16: torch.float16, DType.kBFloat16: torch.bfloat16}


class FP8FwdTensors(enum.IntEnum):
    """Places of the forward pass's scales."""

    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    """Places of the backward pass's scales."""

    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


def generic_gemm(
    A, transa, B, transb, D, quantizer, out_dtype, bias, bias_type, gelu, gelu_in, grad, workspace,
    workspace_size, accumulate, split_accumulator, comm_overlap=None, comm_type=None, extra_output=None,
    bulk_overlap=False, alpha=1.0, beta=None,
):  # fmt: skip
    """op(A) op(B) of column major matrices: what lies row major in memory is op(B) op(A).

    TN is a linear layer's forward (A weight, B input), NN its input's gradient, NT its weight's. Returns
    (the product, added to ``D`` with ``accumulate``, the gradient of the bias, None, None).
    """
    assert quantizer is None and not gelu and comm_overlap is None and alpha == 1.0
    leading = B.shape[:-1]
    a, b = A.flatten(0, -2), B.flatten(0, -2)
    out = (b.t() if transb else b) @ (a.t() if transa else a)
    if not transb:
        out = out.view(*leading, out.size(-1))
    if bias is not None and not grad:
        out = out + bias
    bias_grad = b.sum(0) if bias is not None and grad else None
    if D is None:
        D = out if out_dtype is None else out.to(_TORCH[DType(out_dtype)])
    elif accumulate:
        D.add_(out.view_as(D))
    else:
        D.copy_(out.view_as(D))
    return D, bias_grad, None, None


def rmsnorm_fwd(x, weight, eps, out, quantizer, out_dtype, sm_margin, zero_centered_gamma):
    """(y [rows, h], None, 1 / rms [rows])."""
    assert out is None and quantizer is None
    rstd = torch.rsqrt(x.float().square().mean(-1) + eps)
    y = x.float() * rstd[:, None] * (weight.float() + zero_centered_gamma)
    return y.to(_TORCH[DType(out_dtype)]), None, rstd


def rmsnorm_bwd(dy, x, rstd, weight, sm_margin, zero_centered_gamma):
    """(dx [rows, h], dweight [h])."""
    x_hat, g = x.float() * rstd[:, None], dy.float() * (weight.float() + zero_centered_gamma)
    dx = rstd[:, None] * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * x_hat).sum(0).to(weight.dtype)


def layernorm_fwd(x, weight, bias, eps, out, quantizer, out_dtype, sm_margin, zero_centered_gamma):
    """(y [rows, h], mean [rows], 1 / standard deviation [rows])."""
    assert out is None and quantizer is None and not zero_centered_gamma
    y, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    return y.to(_TORCH[DType(out_dtype)]), mean.flatten(), rstd.flatten()


def layernorm_bwd(dy, x, mean, rstd, weight, sm_margin, zero_centered_gamma):
    """(dx [rows, h], dweight [h], dbias [h])."""
    x_hat, g = (x.float() - mean[:, None]) * rstd[:, None], dy.float() * weight.float()
    dx = rstd[:, None] * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
    dy = dy.float()
    return dx.to(x.dtype), (dy * x_hat).sum(0).to(weight.dtype), dy.sum(0).to(weight.dtype)


def multi_tensor_scale(chunk_size, overflow, lists, scale):
    """lists[1] = lists[0] * scale."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(chunk_size, overflow, lists, per_tensor=False):
    """(norm of all values [1], norm of each tensor or nothing)."""
    norms = torch.stack([tensor.double().norm() for tensor in lists[0]])
    each = norms.float() if per_tensor else torch.empty(0)
    return norms.norm().float().view(1), each


def multi_tensor_adam(
    chunk_size, overflow, lists, lr, beta1, beta2, eps, step, adam_w_mode, bias_correction, weight_decay
):
    """Adam over lists of (gradients, parameters, first moments, second moments[, master weights])."""
    corrections = [1 - beta**step if bias_correction else 1.0 for beta in (beta1, beta2)]
    for grad, param, m, v, *master in zip(*lists, strict=True):
        value, grad = (master[0] if master else param).float(), grad.float()
        grad = grad if adam_w_mode else grad + weight_decay * value
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (m / corrections[0]) / ((v / corrections[1]).sqrt() + eps)
        update = update + weight_decay * value if adam_w_mode else update
        for kept in (param, *master):
            kept.copy_(value - lr * update)


def softmax_rows(x: Tensor, scale: float) -> Tensor:
    """softmax(scale * x) over the last axis, above the diagonal left out."""
    rows, columns = x.shape[-2:]
    hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1)
    return (x.float() * scale).masked_fill(hidden, -math.inf).softmax(-1).to(x.dtype)


def scaled_upper_triang_masked_softmax_forward(x, scale):
    """Causal softmax; x [batch * heads, s, s]."""
    return softmax_rows(x, scale)


def scaled_upper_triang_masked_softmax_backward(dy, y, scale):
    """Its gradient."""
    dy, y = dy.float(), y.float()
    return (scale * y * (dy - (dy * y).sum(-1, keepdim=True))).to(torch.bfloat16)


def convert_thd_to_bshd(tensor, cu_seqlens, batch_size, longest):
    """[t, n, d] -> [b, longest, n, d]: one sequence a row, what is left of it 0."""
    out = tensor.new_zeros(batch_size, longest, *tensor.shape[1:])
    for row, first, last in zip(out, cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        row[: last - first] = tensor[first:last]
    return out


def convert_bshd_to_thd(tensor, cu_seqlens, count):
    """[b, longest, n, d] -> [count, n, d], the inverse."""
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([row[:length] for row, length in zip(tensor, lengths, strict=True)])


def _rotated(t: Tensor, angles: Tensor, sign: float) -> Tensor:
    """t [s, b, n, d] turned by angles [s, 1, 1, r], r <= d; channel i is paired with i + r / 2."""
    turned, kept = t[..., : angles.size(-1)].float(), t[..., angles.size(-1) :]
    first, second = turned.chunk(2, dim=-1)
    out = turned * angles.cos() + sign * torch.cat([-second, first], dim=-1) * angles.sin()
    return torch.cat([out.to(t.dtype), kept], dim=-1)


def fused_rope_forward(t, freqs, start_positions, tensor_format, interleaved, cu_seqlens, cp_size, cp_rank):
    """Rotary embedding of [s, b, n, d] by angles [s, 1, 1, d]."""
    assert start_positions is None and cu_seqlens is None and not interleaved and cp_size == 1
    return _rotated(t, freqs[: t.size(0)], 1.0)


def fused_rope_backward(dy, freqs, *layout):
    """Its gradient: the same rotation backwards."""
    return _rotated(dy, freqs[: dy.size(0)], -1.0)


def dequantize(tensor, dtype):
    """The numbers that a Float8Tensor stands for."""
    kinds = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}
    values = tensor._data.view(kinds[DType(tensor._fp8_dtype)]).float() * tensor._scale_inv
    return values.to(_TORCH[DType(dtype)])
