"""Causal self attention from the joint QKV projection to the context, norms and rotary embedding included.

On a CPU one C++ kernel a direction reads the projection where it lies and, in backward, writes its
gradient where it belongs: no rotated copies, no split, no concatenation. torch's flash kernel for
CPUs reaches a third of a core's matmul rate on short sequences (docs/kernels.md); this one is a
blocked product of its own, with the softmax's maxima and sums taken across vectors. Blocks of scores that
a window or the documents of a sequence leave empty are skipped in both directions.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.kernels import documents, fused
from megatron_ext.kernels.fused import _kernels

#: Widths of a head that fill the vectors of every instruction set.
_WIDTH_UNIT = 16


def supports(qkv: Tensor, head_width: int) -> bool:
    """Whether the kernel can take this projection."""
    return fused.supports(qkv) and head_width % _WIDTH_UNIT == 0


class Norms(NamedTuple):
    """RMSNorm of the queries and keys of each head: gains [d] and epsilon."""

    query_gain: Tensor
    key_gain: Tensor
    eps: float


def causal_attention_reference(
    qkv: Tensor,
    heads_per_group: int,
    head_width: int,
    freqs: Tensor | None,
    scale: float,
    norms: Norms | None = None,
    window: int | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """The attention in plain PyTorch; see :func:`causal_attention`."""
    s, b, groups, _ = qkv.shape
    q, k, v = qkv.split([heads_per_group * head_width, head_width, head_width], dim=-1)
    q = q.reshape(s, b, groups * heads_per_group, head_width)
    if norms is not None:
        q = fused.rms_norm_reference(q, norms.query_gain, norms.eps)
        k = fused.rms_norm_reference(k, norms.key_gain, norms.eps)
    if freqs is not None:
        q, k = (fused.apply_rope_reference(t, freqs) for t in (q, k))
    k, v = (t.repeat_interleave(heads_per_group, dim=2) for t in (k, v))
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) * scale
    shown = torch.ones(s, s, dtype=torch.bool, device=qkv.device).tril()
    shown = shown if window is None else shown.triu(-window)
    shown = shown if starts is None else shown & documents.shown(starts)
    weights = F.softmax(scores.masked_fill(~shown, -torch.inf), dim=-1)
    return torch.einsum("bnij,jbnd->ibnd", weights, v).flatten(2)


class _CausalAttention(torch.autograd.Function):
    """Saves the projection, the context and one number for each query and head."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        gains: Tensor | None,
        eps: float,
        freqs: Tensor | None,
        sizes: tuple[int, int],
        first: Tensor | None,
        scale: float,
    ) -> Tensor:
        """``gains`` [2, d]; ``sizes``: query heads per group, head width; ``first``: of `_first_keys`."""
        qkv = qkv.detach().contiguous()
        s, b, groups, _ = qkv.shape
        heads_per_group, width = sizes
        heads = groups * heads_per_group
        out = qkv.new_empty(s, b, heads * width)
        lse = torch.empty(b, heads, s, dtype=torch.float32)
        tables = () if freqs is None else fused._cosine_and_sine(freqs)
        norms = None if gains is None else fused._float(gains)
        ctx.tables, ctx.norms, ctx.eps = tables, norms, eps
        ctx.gains_dtype = None if gains is None else gains.dtype
        ctx.sizes, ctx.first, ctx.scale = (s, b, groups, *sizes), first, scale
        _kernels.attention_forward(*_head(qkv, ctx), out.data_ptr(), lse.data_ptr(), *_tail(ctx))
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        qkv_grad = torch.empty_like(qkv)
        _, b, groups, _, width = ctx.sizes
        gain_grads = None if ctx.norms is None else torch.empty(b * groups, 2, width)
        addresses = [fused._address(t) for t in (out, lse, grad, qkv_grad, gain_grads)]
        _kernels.attention_backward(*_head(qkv, ctx), *addresses, *_tail(ctx))
        gains_grad = None if gain_grads is None else gain_grads.sum(0).to(ctx.gains_dtype)
        return qkv_grad, gains_grad, None, None, None, None, None


def _head(qkv: Tensor, ctx: Any) -> tuple[Any, ...]:
    """The kernels' first arguments: storage type, projection, rotary tables with their width, norms."""
    cosine, sine = ctx.tables or (None, None)
    rotated = 0 if cosine is None else cosine.size(-1)
    rotary = (fused._address(cosine), fused._address(sine), rotated)
    return fused._is_bf16(qkv), qkv.data_ptr(), rotary, (fused._address(ctx.norms), ctx.eps)


def _tail(ctx: Any) -> tuple[Any, ...]:
    """The kernels' last arguments: sizes, the first key of each query, scale, threads."""
    return ctx.sizes, fused._address(ctx.first), ctx.scale, torch.get_num_threads()


def _first_keys(qkv: Tensor, window: int | None, starts: Tensor | None) -> Tensor | None:
    """[b, s] int32: the first key that each query sees; None if it is key 0 for all."""
    if window is None:
        return None if starts is None else starts.int().contiguous()
    first = torch.arange(-window, qkv.size(0) - window, dtype=torch.int32).clamp(min=0)
    return (first.expand(qkv.size(1), -1) if starts is None else first.maximum(starts)).contiguous()


def causal_attention(
    qkv: Tensor,
    heads_per_group: int,
    head_width: int,
    freqs: Tensor | None,
    scale: float,
    norms: Norms | None = None,
    window: int | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """softmax(scale rope(norm(q)) rope(norm(k))^T + mask) v, with keys and values shared within groups.

    Args:
        qkv: [s, b, groups, (r + 2) d]: r = ``heads_per_group`` query heads of ``head_width`` d, then
            the group's key and value (Megatron-Core's ``linear_qkv``); float32 or bfloat16.
        freqs: angles [s, 1, 1, rot] of the rotary embedding, or None; no gradient flows to them.
        norms: the norms of queries and keys, or None.
        window: number of preceding tokens that a token attends to; None for all.
        starts: [b, s] int32 (documents.py), or None for one document a sequence.
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
    if starts is not None and starts.shape != (qkv.size(1), qkv.size(0)):
        raise ValueError(
            f"causal_attention needs starts [b, s]; got {tuple(starts.shape)} for {tuple(qkv.shape)}"
        )
    if not supports(qkv, head_width):
        return causal_attention_reference(
            qkv, heads_per_group, head_width, freqs, scale, norms, window, starts
        )
    gains = None if norms is None else torch.stack([norms.query_gain, norms.key_gain])
    eps = 0.0 if norms is None else norms.eps
    sizes, first = (heads_per_group, head_width), _first_keys(qkv, window, starts)
    return _CausalAttention.apply(qkv, gains, eps, freqs, sizes, first, scale)
