"""Rotary position embedding in one pass, in the places where Megatron-Core looks for its own."""

import torch
from torch import Tensor

from megatron_ext.kernels import fused


def apply_rotary(
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool | None = False,
    mscale: float = 1.0,
    mla_rotary_interleaved: bool = False,
) -> Tensor:
    """t * cos(freqs) + rotate_half(t) * sin(freqs); [s, b, n, d], [s, 1, 1, rot] -> [s, b, n, d].

    Stands for rope_utils.py:_apply_rotary_pos_emb_bshd; the signature is upstream's (0.19
    has ``mla_rotary_interleaved`` too). The argument rules leave only halves rotated, without scaling
    of the magnitudes.
    """
    assert not (rotary_interleaved or multi_latent_attention or mla_rotary_interleaved) and mscale == 1.0
    return fused.apply_rope(t, freqs)


def provide_rope() -> None:
    """Let Megatron-Core rotate by :func:`apply_rotary` on a GPU too, where no seam puts it in its place.

    Transformer Engine's own fused rotation goes before it (rope_utils.py 237, ``apply_rope_fusion``).
    """
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils._apply_rotary_pos_emb_bshd = apply_rotary


def split_and_rotate_reference(
    qkv: Tensor, members: int, d: int, freqs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The split in plain PyTorch; see :func:`split_and_rotate`."""
    s, b, groups, _ = qkv.shape
    q, k, v = torch.split(qkv, [members * d, d, d], dim=-1)
    q = q.reshape(s, b, groups * members, d)
    return fused.apply_rope_reference(q, freqs), fused.apply_rope_reference(k, freqs), v


def split_and_rotate(qkv: Tensor, members: int, d: int, freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated keys and values of a joint projection; on a GPU (``launch.supports``).

    **Uses the projection up**: one kernel each turns queries and keys where they lie, so attention saves
    the projection and no copy of it; only with several query heads a group the queries move. Backward
    writes the gradient of the whole projection, where autograd would join three.

    Args:
        qkv: [s, b, groups, (members + 2) d]: query heads, then key and value, of each group.
        freqs: angles [s, 1, 1, rot], rot <= d and even; no gradient flows to them.
    Returns:
        [s, b, groups * members, d], [s, b, groups, d] and [s, b, groups, d]; all but the queries of several
        heads a group are views of ``qkv``.
    """
    from megatron_ext.kernels import triton_rope

    return triton_rope.split_and_rotate(qkv, members, d, freqs)
