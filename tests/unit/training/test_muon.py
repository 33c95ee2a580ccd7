"""The update of Muon: the iteration, the parts of joint projections, the whole step beside torch's."""

import pytest
import torch
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch import Tensor

from megatron_ext.training.muon import MATRICES, Muon, Parts, newton_schulz, scale

pytestmark = pytest.mark.usefixtures("single_process")


def reference(gradient: Tensor, dtype: torch.dtype = torch.float64, steps: int = 5) -> Tensor:
    """The quintic iteration as its authors write it."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.to(dtype)
    if tall := x.size(0) > x.size(1):
        x = x.T
    x = x / max(x.norm().item(), 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (1, 7)])
def test_iteration_is_the_published_one(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(x)
    for one, expected in zip(found, map(reference, x), strict=True):
        assert (one - expected).abs().max() < 5e-6  # fp32's rounding over five iterations
    for one, expected in zip(found, [reference(one, torch.float32) for one in x], strict=True):
        assert (one - expected).abs().max() < 1e-6
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3 and values.max() < 1.3


def test_zero_stays_zero():
    assert torch.equal(newton_schulz(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def test_rows_may_be_permuted():
    x = torch.randn(1, 20, 12, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(newton_schulz(x[:, order]), newton_schulz(x)[:, order], atol=1e-6)


def test_parts_of_a_joint_projection():
    weight = torch.arange(24).float()[:, None].expand(24, 5)
    parts = Parts(2, (8, 2, 2))  # two groups, each of 8 rows of queries, 2 of keys, 2 of values
    q, k, v = parts.split(weight)
    assert q[:, 0].tolist() == [*range(8), *range(12, 20)]
    assert (k[:, 0].tolist(), v[:, 0].tolist()) == ([8, 9, 20, 21], [10, 11, 22, 23])
    assert torch.equal(parts.join([q, k, v]), weight)


def test_scales():
    assert [scale(8, 2, mode) for mode in ("unit_rms_norm", "shape_scaling", "spectral")] == [2, 2, 8**0.5]
    assert [scale(2, 8, mode) for mode in ("unit_rms_norm", "shape_scaling", "spectral")] == [0.5, 1, 8**0.5]


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_torchs(nesterov):
    """Three steps beside torch.optim.Muon, whose iteration is in bf16, and beside the formula in fp64."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16, 48, generator=generator)
    gradients = [torch.randn(16, 48, generator=generator) for _ in range(3)]
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours.muon_parts, ours.tensor_model_parallel = Parts(1, (16,)), False
    vector = torch.nn.Parameter(torch.ones(4))
    options = OptimizerConfig(muon_momentum=0.9, muon_use_nesterov=nesterov, muon_extra_scale_factor=0.2)
    groups = [{"params": [ours], MATRICES: True}, {"params": [vector], MATRICES: False}]
    muon = Muon.with_options(options)(groups, lr=0.1, weight_decay=0.5)
    torchs = torch.optim.Muon(
        [theirs], 0.1, 0.5, momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    exact, momentum = start.double(), torch.zeros(16, 48).double()
    for gradient in gradients:
        ours.grad, theirs.grad, vector.grad = gradient.clone(), gradient.clone(), torch.ones(4)
        muon.step()
        torchs.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        ahead = 0.9 * momentum + 0.1 * gradient if nesterov else momentum
        exact = (1 - 0.1 * 0.5) * exact - 0.1 * 0.2 * 48**0.5 * reference(ahead)
    assert (ours - exact).abs().max() < 1e-6
    assert (ours - theirs).abs().max() < 0.02
    assert vector[0] < 1 and {*muon.state[vector]} == {"exp_avg", "exp_avg_sq"}
    assert {*muon.state[ours]} == {"momentum_buffer"}
