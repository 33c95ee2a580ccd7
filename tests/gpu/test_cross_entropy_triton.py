"""The Triton cross entropy against torch's in float64; on a GPU, or interpreted (tests/gpu/interpret.sh)."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.kernels import cross_entropy
from tests.gpu.interpreted import DEVICE, must_start, needs_triton, tolerance

pytestmark = needs_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    with must_start(monkeypatch, "_stats_kernel", "_grad_kernel"):
        yield


def example(rows: int, v: int, dtype: torch.dtype, scale: float = 3.0):
    generator = torch.Generator().manual_seed(rows + v)
    logits = (torch.randn(rows, v, generator=generator) * scale).to(DEVICE, dtype)
    target = torch.randint(v, (rows,), generator=generator).to(DEVICE)
    return logits, target, torch.rand(rows, generator=generator).to(DEVICE)


def expected(logits, target, grad):
    wide = logits.double().requires_grad_()
    loss = F.cross_entropy(wide, target, reduction="none")
    return loss.detach(), torch.autograd.grad(loss, wide, grad.double())[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, v, scale", [(3, 1, 3.0), (4, 7, 3.0), (9, 100, 300.0), (3, 8200, 3.0)])
def test_loss_and_gradient(rows, v, scale, dtype):
    logits, target, grad = example(rows, v, dtype, scale)
    loss, gradient = expected(logits, target, grad)
    leaf = logits.clone().view(rows, 1, v).requires_grad_()
    found = cross_entropy.vocab_parallel_cross_entropy(leaf, target[:, None])
    assert found.dtype == torch.float32 and found.shape == (rows, 1)
    torch.testing.assert_close(found[:, 0].double(), loss, rtol=3e-6, atol=1e-5 * scale)
    found.backward(grad[:, None])
    torch.testing.assert_close(leaf.grad[:, 0].double(), gradient, **tolerance(dtype))
    assert leaf.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [36, 25, 18, 13])
def test_a_vocabulary_in_two_shards(vocab_size, dtype):
    """Each masks its own part of the padding; the second may hold nothing else."""
    logits, _, grad = example(11, 36, dtype)
    target = torch.randint(vocab_size, (11,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    loss, gradient = expected(logits[:, :vocab_size], target, grad)
    logits[:, vocab_size:] = torch.finfo(dtype).max  # read by nobody
    parts = [(part.contiguous(), 18 * i) for i, part in enumerate(logits.chunk(2, dim=1))]
    widths = [cross_entropy.width_of_shard(18, first, vocab_size) for _, first in parts]
    stats = [
        cross_entropy.cross_entropy_stats(part, target, first, width)
        for (part, first), width in zip(parts, widths, strict=True)
    ]
    top = torch.stack([s[0] for s in stats]).amax(0)
    total = sum(s[1] * (s[0] - top).exp() for s in stats)
    chosen = sum(s[2] for s in stats)
    torch.testing.assert_close((total.log() + top - chosen).double(), loss, rtol=2e-6, atol=2e-6)
    for (part, first), width in zip(parts, widths, strict=True):
        assert cross_entropy.cross_entropy_grad_(part, target, first, top, total, grad, width) is part
    found = torch.cat([part for part, _ in parts], dim=1)
    torch.testing.assert_close(found[:, :vocab_size].double(), gradient, **tolerance(dtype))
    assert not found[:, vocab_size:].any()


@pytest.mark.parametrize("v", [5, 40])
def test_masked_and_broken_logits(v):
    """What has no finite loss in the formula has none here."""
    logits, target, grad = example(5, v, torch.float32)
    logits[0, target[0] - 1] = -torch.inf
    logits[1, 0], logits[2, v - 1], logits[3] = torch.nan, torch.inf, -torch.inf
    want, want_gradient = expected(logits, target, grad)
    leaf = logits.clone().requires_grad_()
    found = cross_entropy.vocab_parallel_cross_entropy(leaf, target)
    found.backward(grad)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(leaf.grad.double(), want_gradient, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_target_in_the_padding_has_no_finite_loss():
    logits, target, grad = example(4, 20, torch.float32)
    target[2] = 17
    leaf = logits.requires_grad_()
    loss = cross_entropy.vocab_parallel_cross_entropy(leaf, target.clamp(max=17), vocab_size=17)
    assert loss[2] == torch.inf and not loss.isnan().any()
    loss.backward(grad)


def test_backward_uses_the_logits_up():
    logits, target, _ = example(4, 20, torch.float32)
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1.0
    values = hidden.square()  # saves the logits for its own backward
    loss = cross_entropy.vocab_parallel_cross_entropy(hidden, target).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(hidden.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()
