"""Rotary embedding as one Triton kernel, for GPUs: of a tensor, or of a joint QKV projection as it is split.

Cosines and sines are made once for queries and keys, both ways, in float32: in the kernel they would cost
more than its traffic. They are not kept from layer to layer, for what a CUDA graph records must not read what
another computed. Backward is the same kernel with the rotation turned round.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.kernels.launch import launch
from megatron_ext.kernels.triton_language import blocks, jit, power_of_2, tl

# One program turns HEADS heads of one token. Tensors are [s, b, groups, members, d] with the last stride 1;
# HALF is half of the rotated channels, REST those past them (0: none to copy), both as powers of two.


@jit
@no_type_check
def _rotate_kernel(
    t, cosine, sine, out, batch, heads, members, d, half,
    t_s, t_b, t_group, t_member, out_s, out_b, out_group, out_member,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, sample = token // batch, token % batch
    channel = tl.arange(0, HALF)
    angle = row * 2 * half + channel
    first_cosine = tl.load(cosine + angle, mask=channel < half, other=0.0)[None, :]
    second_cosine = tl.load(cosine + half + angle, mask=channel < half, other=0.0)[None, :]
    first_sine = tl.load(sine + angle, mask=channel < half, other=0.0)[None, :]
    second_sine = tl.load(sine + half + angle, mask=channel < half, other=0.0)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    group, member = head // members, head % members
    t += row * t_s + sample * t_b
    out += row * out_s + sample * out_b
    source = (group * t_group + member * t_member)[:, None] + channel[None, :]  # [HEADS, HALF]
    target = (group * out_group + member * out_member)[:, None] + channel[None, :]
    inside = (head < heads)[:, None] & (channel < half)[None, :]
    first = tl.load(t + source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(t + source + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:  # the transpose: the sine of the row that a channel was added to
        first_sine, second_sine = -second_sine, -first_sine
    turned = first * first_cosine - second * first_sine
    tl.store(out + target, turned.to(out.dtype.element_ty), mask=inside)
    turned = second * second_cosine + first * second_sine
    tl.store(out + target + half, turned.to(out.dtype.element_ty), mask=inside)
    if REST:
        channel = 2 * half + tl.arange(0, REST)
        inside = (head < heads)[:, None] & (channel < d)[None, :]
        source = (group * t_group + member * t_member)[:, None] + channel[None, :]
        target = (group * out_group + member * out_member)[:, None] + channel[None, :]
        tl.store(out + target, tl.load(t + source, mask=inside), mask=inside)


_TILE = 2048  # channels of a program


Tables = tuple[Tensor, Tensor]  # cosines and sines, [s, 1, 1, rot], float32


def _tables(freqs: Tensor) -> Tables:
    angles = freqs.detach().float().contiguous()
    return angles.cos(), angles.sin()


def _rotate(t: Tensor, tables: Tables, out: Tensor, back: bool = False) -> Tensor:
    """Turn t [s, b, groups, members, d] by the tables' angles into ``out``; ``t`` itself may be that."""
    s, batch, groups, members, d = t.shape
    if not t.numel():
        return out
    half = tables[0].size(-1) // 2
    width = power_of_2(max(half, 1))
    heads = min(power_of_2(groups * members), max(1, _TILE // (2 * width)))
    rest = d - 2 * half if t.data_ptr() != out.data_ptr() else 0
    touched = 2 * half + rest
    launch(
        _rotate_kernel,
        (s * batch, blocks(groups * members, heads)),
        (t, *tables, out, batch, groups * members, members, d, half, *t.stride()[:4], *out.stride()[:4]),
        reads=(t[..., :touched], *tables),
        writes=(out[..., :touched],),
        num_warps=min(4, blocks(heads * width, 256)),
        BACK=back,
        HEADS=heads,
        HALF=width,
        REST=power_of_2(rest) if rest else 0,
    )
    return out


def _rows(t: Tensor) -> Tensor:
    """``t`` with its channels next to each other."""
    return t if t.stride(-1) == 1 else t.contiguous()


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, freqs: Tensor, inplace: bool) -> Tensor:
        ctx.tables = _tables(freqs)
        if inplace:
            ctx.mark_dirty(t)
            _rotate(t.unsqueeze(2), ctx.tables, t.unsqueeze(2))
            return t
        out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
        _rotate(_rows(t).unsqueeze(2), ctx.tables, out.unsqueeze(2))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        _rotate(_rows(grad).unsqueeze(2), ctx.tables, out.unsqueeze(2), back=True)
        return out, None, None


def apply_rope(t: Tensor, freqs: Tensor, *, inplace: bool = False) -> Tensor:
    """See :func:`megatron_ext.kernels.fused.apply_rope`."""
    return _RoPE.apply(t, freqs, inplace)


class _SplitAndRotate(torch.autograd.Function):
    """Rotates where the projection lies, and writes the gradients where its gradient lies."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, members: int, d: int, freqs: Tensor) -> tuple[Tensor, ...]:
        ctx.shape, ctx.members, ctx.d, ctx.tables = qkv.shape, members, d, _tables(freqs)
        s, b, groups, _ = qkv.shape
        q_part, k, v = _parts(qkv, members, d)
        # The heads of several members a group do not lie at equal distances, as attention wants them.
        q = q_part if members == 1 else qkv.new_empty(s, b, groups, members, d)
        _rotate(q_part, ctx.tables, q)
        _rotate(k, ctx.tables, k)
        torch.autograd.graph.increment_version(qkv)  # written behind autograd's back
        return q.flatten(2, 3), k.squeeze(3), v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        qkv = torch.empty(ctx.shape, dtype=dq.dtype, device=dq.device)
        q_part, k_part, v_part = _parts(qkv, ctx.members, ctx.d)
        _rotate(_rows(dq).unflatten(2, (-1, ctx.members)), ctx.tables, q_part, back=True)
        _rotate(_rows(dk).unsqueeze(3), ctx.tables, k_part, back=True)
        v_part.copy_(dv)
        return qkv, None, None, None


def _parts(qkv: Tensor, members: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q [s, b, groups, members, d], k [s, b, groups, 1, d] and v [s, b, groups, d]."""
    q, k, v = qkv.split([members * d, d, d], dim=-1)
    return q.unflatten(-1, (members, d)), k.unsqueeze(3), v


def split_and_rotate(qkv: Tensor, members: int, d: int, freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`megatron_ext.kernels.rope.split_and_rotate`."""
    return _SplitAndRotate.apply(_rows(qkv), members, d, freqs)
