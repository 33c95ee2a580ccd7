"""The Triton distillation loss against its formula in float64; on a GPU, or interpreted (interpret.sh)."""

import pytest
import torch

from megatron_ext.kernels.distillation import vocab_parallel_distillation
from megatron_ext.kernels.distillation_shard import shard_grad_, shard_stats
from megatron_ext.kernels.teacher_targets import WholeTargets, largest
from tests.gpu.interpreted import DEVICE, must_start, needs_triton, tolerance
from tests.unit.kernels.test_distillation import example, expected, softened

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    with must_start(monkeypatch, "_both_stats_kernel", "_both_grad_kernel"):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "rows, v, k, scale", [(4, 7, None, 3.0), (9, 100, None, 60.0), (3, 8200, None, 3.0), (5, 90, 8, 3.0)]
)
def test_losses_and_gradient(rows, v, k, scale, temperature, dtype):
    logits, teacher, target, grads = example(rows, v, dtype, scale)
    entropy, divergence, gradient = expected(
        logits, target, softened(teacher, temperature), temperature, grads, k
    )
    targets = WholeTargets(teacher.to(DEVICE), temperature)
    leaf = logits.to(DEVICE).requires_grad_()
    found = vocab_parallel_distillation(
        leaf, target.to(DEVICE), targets if k is None else largest(targets, k)
    )
    close = dict(rtol=5e-6, atol=2e-6 * scale)
    torch.testing.assert_close(found[0].double().cpu(), entropy, **close)
    torch.testing.assert_close(found[1].double().cpu(), divergence, **close)
    (found[0] * grads[0].to(DEVICE) + found[1] * grads[1].to(DEVICE)).sum().backward()
    torch.testing.assert_close(leaf.grad.double().cpu(), gradient, **tolerance(dtype))


@pytest.mark.parametrize("width", [40, 33, 1])
@pytest.mark.parametrize("shunned", [False, True])
def test_padding_and_a_shard_that_the_teacher_shuns(width, shunned):
    """What the kernel says of a shard is what the formula says, and nobody reads the padding."""
    logits, teacher, target, _ = example(6, 40, torch.float32)
    teacher[:, ::2] = -torch.inf
    if shunned:
        teacher[:] = -torch.inf
    first, target = 20, target + 10
    arguments = target.to(DEVICE), teacher.to(DEVICE), 1.5, first, width
    found = shard_stats(logits.to(DEVICE), *arguments)
    wide = shard_stats(logits.double(), target, teacher.double(), 1.5, first, width)
    for one, other in zip(found, wide, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=2e-5, atol=2e-5)
    row = torch.rand(6, 6) + torch.tensor([5.0, 5.0, 0, 0, 0, 0])[:, None]
    got = shard_grad_(logits.clone().to(DEVICE), *arguments[:-1], row.to(DEVICE), width)
    want = shard_grad_(logits.double(), target, teacher.double(), 1.5, first, row.double(), width)
    torch.testing.assert_close(got.double().cpu(), want, rtol=2e-5, atol=2e-5)
    assert not got[:, width:].any()
