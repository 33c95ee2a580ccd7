"""The Triton rotary embedding against its formula; on a GPU, or interpreted (tests/gpu/interpret.sh)."""

import pytest
import torch

from megatron_ext.kernels import fused, rope, triton_rope
from tests.gpu.interpreted import DEVICE, needs_triton, tolerance

pytestmark = needs_triton


def angles(s: int, rot: int) -> torch.Tensor:
    """As Megatron-Core makes them, but the halves differ, so that their order matters."""
    rates = 10000.0 ** -(torch.arange(rot) / rot)
    return (torch.arange(s)[:, None] * rates).view(s, 1, 1, rot).to(DEVICE)


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(found, expected, dtype: torch.dtype):
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        torch.testing.assert_close(got.double(), want, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "s, b, n, d, rot",
    [(5, 2, 3, 16, 16), (3, 1, 1, 2, 2), (4, 2, 5, 24, 12), (2, 2, 33, 96, 96), (3, 2, 2, 10, 0)],
)
def test_matches_the_formula(s, b, n, d, rot, inplace, dtype):
    """Whole, partial and no rotation, odd widths, more heads than a tile; a strided input."""
    freqs, dy = angles(s, rot), numbers(s, b, n, d, dtype=dtype)
    joint = numbers(s, b, n, 2 * d, dtype=dtype).requires_grad_()
    t = joint[..., d:]
    y = checked_rope(t.clone() if inplace else t, freqs, inplace)
    grad = torch.autograd.grad(y, joint, dy)[0]
    wide = joint.detach().double().requires_grad_()
    want = fused.apply_rope_reference(wide[..., d:], freqs.double())
    close([y, grad], [want, torch.autograd.grad(want, wide, dy.double())[0]], dtype)


def checked_rope(t, freqs, inplace):
    y = triton_rope.apply_rope(t, freqs, inplace=inplace)
    assert (y.data_ptr() == t.data_ptr()) == inplace
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups, members", [(3, 1), (2, 2), (1, 5)])
@pytest.mark.parametrize("d, rot", [(16, 16), (16, 8)])
def test_the_joint_projection_is_split_and_rotated(groups, members, d, rot, dtype):
    s, b = 4, 2
    freqs = angles(s, rot)
    qkv = numbers(s, b, groups, (members + 2) * d, dtype=dtype).requires_grad_()
    wide = qkv.detach().double().requires_grad_()
    found = triton_rope.split_and_rotate(qkv, members, d, freqs)
    held = {part.untyped_storage().data_ptr() for part in found}  # by whatever saves the three
    assert len(held) == (1 if members == 1 else 2)
    # Attention hands the gradients back as [b, n, s, d].
    dys = [
        torch.cos(torch.arange(y.numel())).to(y).view(b, y.size(2), s, d).permute(2, 0, 1, 3) for y in found
    ]
    grad = torch.autograd.grad(found, qkv, dys)[0]
    expected = rope.split_and_rotate_reference(wide, members, d, freqs.double())
    want = torch.autograd.grad(expected, wide, [dy.double() for dy in dys])[0]
    close([*found, grad], [*expected, want], dtype)


def test_who_still_needs_the_projection_is_told():
    qkv = numbers(2, 1, 1, 12, dtype=torch.float32).requires_grad_()
    projection = qkv * 1.0
    other = projection.square()  # saves the projection for its own backward
    triton_rope.split_and_rotate(projection, 1, 4, angles(2, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


def test_far_positions_keep_their_angle():
    """cos and sin of thousands of radians, as at the end of a long sequence."""
    freqs = torch.full((1, 1, 1, 4), 131071.0, device=DEVICE)
    t = torch.ones(1, 1, 1, 4, device=DEVICE)
    want = fused.apply_rope_reference(t.double(), freqs.double())
    torch.testing.assert_close(triton_rope.apply_rope(t, freqs).double(), want, rtol=1e-5, atol=1e-6)
