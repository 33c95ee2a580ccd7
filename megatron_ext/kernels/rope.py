"""Rotary position embedding in one pass, in the place where Megatron-Core looks for its own."""

from torch import Tensor

from megatron_ext.kernels import fused


def apply_rotary(
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
) -> Tensor:
    """t * cos(freqs) + rotate_half(t) * sin(freqs); [s, b, n, d], [s, 1, 1, rot] -> [s, b, n, d].

    Stands for rope_utils.py:_apply_rotary_pos_emb_bshd on a CPU; the signature is upstream's. The
    argument rules leave only halves rotated, without scaling of the magnitudes.
    """
    assert not rotary_interleaved and not multi_latent_attention and mscale == 1.0
    return fused.apply_rope(t, freqs)
