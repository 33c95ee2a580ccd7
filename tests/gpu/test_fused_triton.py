"""The Triton series activation against its formula.

Needs a GPU; tests/gpu/interpret.sh runs the same kernels in Triton's interpreter on the CPU.
"""

import pytest
import torch

from megatron_ext.kernels import fused, triton_activation
from tests.gpu.interpreted import DEVICE, INTERPRETED, needs_triton, tolerance

#: The interpreter takes seconds for the last.
SIZES = [(1, 1), (5, 33), (6, 257)] if INTERPRETED else [(1, 1), (5, 33), (70, 300), (1000, 6912)]
pytestmark = needs_triton


def run(function, inputs: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The output and every input's gradient, for a fixed gradient of the output that ``dtype`` holds."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    dy = torch.cos(torch.arange(y.numel())).view_as(y).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("rows, f", SIZES)
def test_matches_the_formula(rows, f, n, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 2 * f), (n, f), (n, f))
    inputs = [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    found = run(triton_activation.series_swiglu, inputs, dtype)
    expected = run(fused.series_swiglu_reference, [t.double() for t in inputs], dtype)
    allowed = tolerance(dtype)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        scale = max(1.0, want.abs().max().item())
        torch.testing.assert_close(got.double(), want, rtol=allowed["rtol"], atol=allowed["atol"] * scale)


def test_infinities_pass_as_in_the_formula():
    """n = 3 leaves one row of the tile of four unused: it must add nothing, not 0 * inf = nan."""
    x = torch.ones(2, 8, device=DEVICE)
    x[1, 2] = torch.inf
    a, b = torch.ones(3, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    torch.testing.assert_close(
        triton_activation.series_swiglu(x, a, b), fused.series_swiglu_reference(x, a, b)
    )


def test_same_bits_from_run_to_run():
    inputs = [torch.randn(*shape, device=DEVICE) for shape in ((70, 80), (2, 40), (2, 40))]
    first, second = (run(triton_activation.series_swiglu, inputs, torch.float32) for _ in range(2))
    assert all(map(torch.equal, first, second))
