"""The Triton RMSNorm against its formula; on a GPU, or interpreted (tests/gpu/interpret.sh)."""

import pytest
import torch

from megatron_ext.kernels import fused, launch, triton_norm
from tests.gpu.interpreted import DEVICE, needs_triton, tolerance

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 40), (70, 33), (2, 2048)])
def test_matches_the_formula(shape, dtype):
    """More rows than a program of the backward owns, and widths that are no power of two."""
    generator = torch.Generator().manual_seed(shape[0])
    x, dy = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    w = torch.randn(shape[-1], generator=generator).to(DEVICE, dtype)
    inputs = [t.requires_grad_() for t in (x, w)]
    y = triton_norm.rms_norm(*inputs, 1e-5)
    found = [y, *torch.autograd.grad(y, inputs, dy)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    y = fused.rms_norm_reference(*wide, 1e-5)
    expected = [y, *torch.autograd.grad(y, wide, dy.double())]
    allowed = tolerance(dtype)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        atol = allowed["atol"] * max(1.0, want.abs().max().item())
        torch.testing.assert_close(got.double(), want, rtol=allowed["rtol"], atol=atol)


def test_stands_in_where_torch_has_none(monkeypatch):
    monkeypatch.setattr(fused, "_kernels", None)
    x, w, started = torch.ones(2, 8, device=DEVICE), torch.ones(8, device=DEVICE), []
    wider = torch.ones(1, 2 * triton_norm.WIDEST, device=DEVICE)
    with launch.observed(lambda kernel: started.append(kernel.kernel) or True):
        monkeypatch.setattr(fused, "_TORCH_FUSES_RMS_NORM", True)
        fused.rms_norm(x, w, 1e-5)
        monkeypatch.setattr(fused, "_TORCH_FUSES_RMS_NORM", False)
        fused.rms_norm(wider, torch.ones_like(wider[0]), 1e-5)
        assert started == []
        fused.rms_norm(x, w, 1e-5)
    assert started == ["_norm_forward_kernel"]
