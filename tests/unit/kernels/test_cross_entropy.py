"""Cross entropy over shards of the vocabulary against torch's over the whole."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.kernels import cross_entropy, fused

needs_kernels = pytest.mark.skipif(not fused.available(), reason="megatron_ext._kernels was not built")
DTYPES = [torch.float64, *(pytest.param(t, marks=needs_kernels) for t in (torch.float32, torch.bfloat16))]


def example(rows: int, v: int, dtype, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + v)
    logits = (torch.randn(rows, v, generator=generator, dtype=torch.float64) * scale).to(dtype)
    target = torch.randint(v, (rows,), generator=generator)
    return logits, target, torch.rand(rows, generator=generator).to(torch.float32)


def expected_loss_and_gradient(logits, target, grad):
    wide = logits.double().clone().requires_grad_()
    loss = F.cross_entropy(wide, target, reduction="none")
    return loss.detach(), torch.autograd.grad(loss, wide, grad.double())[0]


def tolerance(dtype) -> dict[str, float]:
    return {
        torch.float64: dict(rtol=1e-10, atol=1e-12),
        torch.float32: dict(rtol=3e-6, atol=1e-7),
        torch.bfloat16: dict(rtol=2**-8, atol=1e-7),
    }[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, v, scale", [(3, 1, 3.0), (4, 7, 3.0), (40, 33, 3.0), (9, 8200, 3.0), (9, 100, 300.0)]
)
def test_loss_and_gradient(rows, v, scale, dtype):
    logits, target, grad = example(rows, v, dtype, scale)
    loss, gradient = expected_loss_and_gradient(logits, target, grad)
    leaf = logits.clone().requires_grad_()
    found = cross_entropy.vocab_parallel_cross_entropy(leaf, target)
    wide = tolerance(torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        found.double(), loss, rtol=wide["rtol"], atol=1e-5 * scale if wide["rtol"] > 1e-9 else 1e-9
    )
    found.backward(grad.to(found.dtype))
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.double(), gradient, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_z_loss_is_in_the_gradient_alone(dtype):
    logits, target, grad = example(12, 33, dtype)
    wide = logits.double().clone().requires_grad_()
    loss = F.cross_entropy(wide, target, reduction="none")
    gradient = torch.autograd.grad(loss + 0.1 * wide.logsumexp(-1).square(), wide, grad.double())[0]
    leaf = logits.clone().requires_grad_()
    found = cross_entropy.vocab_parallel_cross_entropy(leaf, target, z_loss=0.1)
    torch.testing.assert_close(found.double(), loss.detach(), rtol=1e-5, atol=1e-5)
    found.backward(grad.to(found.dtype))
    torch.testing.assert_close(leaf.grad.double(), gradient, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [2, 3])
def test_pieces_of_shards_make_the_whole(shards, dtype):
    logits, target, grad = example(21, 36, dtype)
    loss, gradient = expected_loss_and_gradient(logits, target, grad)
    parts = [(part.contiguous(), i * 36 // shards) for i, part in enumerate(logits.chunk(shards, dim=1))]
    stats = [cross_entropy.cross_entropy_stats(part, target, first) for part, first in parts]
    top = torch.stack([s[0] for s in stats]).amax(0)
    total = sum(s[1] * (s[0] - top).exp() for s in stats)
    chosen = sum(s[2] for s in stats)
    torch.testing.assert_close((total.log() + top - chosen).double(), loss, rtol=2e-6, atol=2e-6)
    grads = [
        cross_entropy.cross_entropy_grad_(part, target, first, top, total, grad.to(top.dtype))
        for part, first in parts
    ]
    torch.testing.assert_close(torch.cat(grads, dim=1).double(), gradient, **tolerance(dtype))


@needs_kernels
@pytest.mark.parametrize("v", [5, 40])
def test_masked_and_broken_logits(v):
    logits, target, grad = example(5, v, torch.float32)
    logits[0, target[0] - 1] = -torch.inf
    logits[1, 0], logits[2, v - 1], logits[3] = torch.nan, torch.inf, -torch.inf
    reference = logits.clone().requires_grad_()
    want = F.cross_entropy(reference, target, reduction="none")
    want_gradient = torch.autograd.grad(want, reference, grad)[0]
    leaf = logits.clone().requires_grad_()
    found = cross_entropy.vocab_parallel_cross_entropy(leaf, target)
    found.backward(grad)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(leaf.grad, want_gradient, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "v", "padding"), [(4, 7, 1), (9, 33, 95), (40, 64, 64), (9, 257, 767)])
def test_padding_takes_no_part(rows, v, padding, dtype):
    """Whatever lies there: loss and gradient are those of the narrower logits, bit for bit in the kernel."""
    logits, target, grad = example(rows, v, dtype)
    narrow = logits.clone().requires_grad_()
    loss = cross_entropy.vocab_parallel_cross_entropy(narrow, target)
    loss.backward(grad.to(loss.dtype))
    large = torch.finfo(dtype).max if padding % 2 else 50.0
    wide = torch.cat([logits, torch.full((rows, padding), large, dtype=dtype)], dim=1).requires_grad_()
    found = cross_entropy.vocab_parallel_cross_entropy(wide, target, vocab_size=v)
    found.backward(grad.to(found.dtype))
    exact = dict(rtol=1e-12 if dtype == torch.float64 else 0, atol=0)
    torch.testing.assert_close(found, loss, **exact)
    torch.testing.assert_close(wide.grad[:, :v], narrow.grad, **exact)
    assert not wide.grad[:, v:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [36, 25, 20, 13])
def test_each_shard_masks_its_own_part_of_the_padding(vocab_size, dtype):
    """Three shards of 12 columns; the last ones may hold padding alone."""
    logits, _, grad = example(21, 36, dtype)
    target = torch.randint(vocab_size, (21,), generator=torch.Generator().manual_seed(3))
    loss, gradient = expected_loss_and_gradient(logits[:, :vocab_size], target, grad)
    parts = [(part.contiguous(), i * 12) for i, part in enumerate(logits.chunk(3, dim=1))]
    widths = [cross_entropy.width_of_shard(12, first, vocab_size) for _, first in parts]
    assert sum(widths) == vocab_size
    stats = [
        cross_entropy.cross_entropy_stats(part, target, first, width)
        for (part, first), width in zip(parts, widths, strict=True)
    ]
    top = torch.stack([s[0] for s in stats]).amax(0)
    total = sum(s[1] * (s[0] - top).exp() for s in stats)
    chosen = sum(s[2] for s in stats)
    torch.testing.assert_close((total.log() + top - chosen).double(), loss, rtol=2e-6, atol=2e-6)
    grads = [
        cross_entropy.cross_entropy_grad_(part, target, first, top, total, grad.to(top.dtype), width)
        for (part, first), width in zip(parts, widths, strict=True)
    ]
    found = torch.cat(grads, dim=1)
    torch.testing.assert_close(found[:, :vocab_size].double(), gradient, **tolerance(dtype))
    assert not found[:, vocab_size:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_target_in_the_padding_has_no_finite_loss(dtype):
    logits, target, _ = example(4, 20, dtype)
    target[2] = 17
    loss = cross_entropy.vocab_parallel_cross_entropy(logits, target.clamp(max=17), vocab_size=17)
    assert loss[2] == torch.inf and not loss.isnan().any()


def test_a_fully_masked_shard_adds_nothing():
    logits, target, _ = example(4, 20, torch.float32)
    top, total, chosen = cross_entropy.cross_entropy_stats(torch.full_like(logits, -torch.inf), target, 20)
    assert (top == -torch.inf).all() and not total.any() and not chosen.any()


def test_backward_uses_the_logits_up():
    logits, target, _ = example(4, 20, torch.float32)
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1.0
    loss = cross_entropy.vocab_parallel_cross_entropy(hidden, target).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(hidden.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="used the logits up"):
        loss.backward()
    used_elsewhere = (leaf * 1.0).square_()
    values = used_elsewhere.square()  # saves the logits for its own backward
    loss = cross_entropy.vocab_parallel_cross_entropy(used_elsewhere, target).sum()
    loss.backward(retain_graph=True)
    if fused.available():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            values.sum().backward()
