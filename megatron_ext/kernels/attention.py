"""Causal self attention from the joint QKV projection to the context, rotary embedding included.

On a CPU one C++ kernel a direction reads the projection where it lies and, in backward, writes its
gradient where it belongs: no rotated copies, no split, no concatenation. torch's flash kernel for
CPUs reaches a third of a core's matmul rate on short sequences (docs/kernels.md); this one is a
blocked product of its own, with the softmax's maxima and sums taken across vectors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.kernels import fused
from megatron_ext.kernels.fused import _kernels

#: Widths of a head that fill the vectors of every instruction set.
_WIDTH_UNIT = 16


def supports(qkv: Tensor, head_width: int) -> bool:
    """Whether the kernel can take this projection."""
    return fused.supports(qkv) and head_width % _WIDTH_UNIT == 0


def causal_attention_reference(
    qkv: Tensor, heads_per_group: int, head_width: int, freqs: Tensor | None, scale: float
) -> Tensor:
    """The attention in plain PyTorch; see :func:`causal_attention`."""
    s, b, groups, _ = qkv.shape
    q, k, v = qkv.split([heads_per_group * head_width, head_width, head_width], dim=-1)
    q = q.reshape(s, b, groups * heads_per_group, head_width)
    if freqs is not None:
        q, k = (fused.apply_rope_reference(t, freqs) for t in (q, k))
    k, v = (t.repeat_interleave(heads_per_group, dim=2) for t in (k, v))
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) * scale
    future = torch.ones(s, s, dtype=torch.bool, device=qkv.device).triu(1)
    weights = F.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
    return torch.einsum("bnij,jbnd->ibnd", weights, v).flatten(2)


class _CausalAttention(torch.autograd.Function):
    """Saves the projection, the context and one number for each query and head."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads_per_group: int, width: int, freqs: Tensor | None, scale: float
    ) -> Tensor:
        qkv = qkv.detach().contiguous()
        s, b, groups, _ = qkv.shape
        heads = groups * heads_per_group
        out = qkv.new_empty(s, b, heads * width)
        lse = torch.empty(b, heads, s, dtype=torch.float32)
        tables = () if freqs is None else fused._cosine_and_sine(freqs)
        ctx.tables, ctx.sizes = tables, ((s, b, groups, heads_per_group, width), scale)
        _kernels.attention_forward(*_head(qkv, tables), out.data_ptr(), lse.data_ptr(), *_tail(ctx.sizes))
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        qkv_grad = torch.empty_like(qkv)
        addresses = [t.data_ptr() for t in (out, lse, grad, qkv_grad)]
        _kernels.attention_backward(*_head(qkv, ctx.tables), *addresses, *_tail(ctx.sizes))
        return qkv_grad, None, None, None, None


def _head(qkv: Tensor, tables: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The kernels' first arguments: storage type, projection, cosines, sines, rotated channels."""
    cosine, sine = tables or (None, None)
    rotated = 0 if cosine is None else cosine.size(-1)
    return fused._is_bf16(qkv), qkv.data_ptr(), fused._address(cosine), fused._address(sine), rotated


def _tail(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*sizes, torch.get_num_threads())


def causal_attention(
    qkv: Tensor, heads_per_group: int, head_width: int, freqs: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale rope(q) rope(k)^T + causal mask) v, with keys and values shared within groups.

    Args:
        qkv: [s, b, groups, (r + 2) d]: r = ``heads_per_group`` query heads of ``head_width`` d, then
            the group's key and value (Megatron-Core's ``linear_qkv``); float32 or bfloat16.
        freqs: angles [s, 1, 1, rot] of the rotary embedding, or None; no gradient flows to them.
    Returns:
        [s, b, groups * r * d] in the dtype of ``qkv``.
    Raises:
        ValueError: the shapes do not fit together.
    """
    rot = 0 if freqs is None else freqs.size(-1)
    fits = qkv.dim() == 4 and qkv.size(3) == (heads_per_group + 2) * head_width
    fits = fits and (freqs is None or not rot or freqs.shape == (qkv.size(0), 1, 1, rot))
    if not fits or rot > head_width or rot % 2:
        shapes = f"{tuple(qkv.shape)}, r = {heads_per_group}, d = {head_width}, {rot} rotated channels"
        raise ValueError(
            f"causal_attention needs qkv [s, b, groups, (r + 2) d] and even rot <= d; got {shapes}"
        )
    arguments = (qkv, heads_per_group, head_width, freqs, scale)
    return (_CausalAttention.apply if supports(qkv, head_width) else causal_attention_reference)(*arguments)
