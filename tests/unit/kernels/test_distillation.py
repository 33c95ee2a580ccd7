"""Cross entropy and divergence from a teacher against their formulas in float64, whole and in shards."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.kernels import cross_entropy, fused
from megatron_ext.kernels.distillation import (
    Stats,
    _relative_to,
    distillation_grad_,
    distillation_stats,
    factors_of,
    losses_of,
    vocab_parallel_distillation,
)
from megatron_ext.kernels.teacher_targets import TopTargets, WholeTargets, largest

needs_kernels = pytest.mark.skipif(not fused.available(), reason="megatron_ext._kernels was not built")
DTYPES = [torch.float64, *(pytest.param(t, marks=needs_kernels) for t in (torch.float32, torch.bfloat16))]
TOLERANCE = {
    torch.float64: dict(rtol=1e-9, atol=1e-11),
    torch.float32: dict(rtol=1e-5, atol=3e-7),
    torch.bfloat16: dict(rtol=2**-8, atol=3e-7),
}


def example(rows: int, v: int, dtype=torch.float64, scale: float = 3.0):
    generator = torch.Generator().manual_seed(rows + v)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, teacher = (draw(rows, v) * scale).to(dtype), (draw(rows, v) * scale).to(dtype)
    target = torch.randint(v, (rows,), generator=generator)
    return logits, teacher, target, (draw(rows).to(torch.float32), draw(rows).to(torch.float32))


def expected(logits, target, q, temperature, grads, k=None):
    """Both losses and the gradient of their weighted sum by autograd from the formulas; ``q`` in float64."""
    wide = logits.double().clone().requires_grad_()
    entropy = F.cross_entropy(wide, target, reduction="none")
    log_p = F.log_softmax(wide / temperature, dim=-1)
    if k is not None:
        top = q.topk(k, dim=-1)
        inside = torch.zeros_like(q, dtype=torch.bool).scatter(-1, top.indices, True)
        log_p, q = log_p.gather(-1, top.indices), q.masked_fill(inside, 0.0)
        if k < wide.size(-1):
            others = (wide / temperature).masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True)
            log_p = torch.cat([log_p, others - (wide / temperature).logsumexp(-1, keepdim=True)], dim=-1)
            q = torch.cat([top.values, q.sum(-1, keepdim=True)], dim=-1)
        else:
            q = top.values
    divergence = (torch.xlogy(q, q) - q * log_p).sum(-1)
    total = (grads[0].double() * entropy + grads[1].double() * divergence).sum()
    return entropy.detach(), divergence.detach(), torch.autograd.grad(total, wide)[0]


def softened(teacher, temperature):
    return F.softmax(teacher.double() / temperature, dim=-1)


def check(logits, target, targets, wanted, grads, **more):
    entropy, divergence, gradient = wanted
    leaf = logits.clone().requires_grad_()
    found = vocab_parallel_distillation(leaf, target, targets, **more)
    exact = logits.dtype == torch.float64
    close = dict(rtol=1e-9, atol=1e-9) if exact else dict(rtol=5e-6, atol=2e-5)
    torch.testing.assert_close(found[0].double(), entropy, **close)
    torch.testing.assert_close(found[1].double(), divergence, **close)
    (found[0] * grads[0] + found[1] * grads[1]).sum().backward()
    assert leaf.grad.dtype == logits.dtype
    torch.testing.assert_close(leaf.grad.double(), gradient, **TOLERANCE[logits.dtype])
    return found


SHAPES = [(3, 1, 3.0), (4, 7, 3.0), (40, 33, 3.0), (5, 8200, 3.0), (9, 100, 100.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("rows, v, scale", SHAPES)
def test_the_whole_distribution(rows, v, scale, temperature, dtype):
    logits, teacher, target, grads = example(rows, v, dtype, scale)
    wanted = expected(logits, target, softened(teacher, temperature), temperature, grads)
    check(logits, target, WholeTargets(teacher, temperature), wanted, grads)


@needs_kernels
@pytest.mark.parametrize("isa", fused._kernels.isa_names() if fused.available() else [])
@pytest.mark.parametrize("of_teacher", [torch.float32, torch.bfloat16])
def test_a_teacher_of_another_format(isa, of_teacher):
    before = fused._kernels.isa()
    fused._kernels.use_isa(isa)
    try:
        logits, teacher, target, grads = example(6, 77, torch.float32)
        teacher = teacher.to(of_teacher)
        wanted = expected(logits, target, softened(teacher, 1.5), 1.5, grads)
        check(logits, target, WholeTargets(teacher, 1.5), wanted, grads)
    finally:
        fused._kernels.use_isa(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rows, v, k", [(3, 1, 1), (4, 7, 3), (40, 33, 32), (5, 8200, 32), (6, 40, 40)])
def test_the_largest_probabilities(rows, v, k, temperature, dtype):
    logits, teacher, target, grads = example(rows, v, dtype)
    targets = largest(WholeTargets(teacher.double(), temperature), k)
    torch.testing.assert_close(targets.logprobs.exp().sum(-1) + targets.rest, torch.ones(rows).double())
    wanted = expected(logits, target, softened(teacher, temperature), temperature, grads, k)
    check(logits, target, targets, wanted, grads)


def test_the_rest_keeps_its_digits():
    """Nearly all of both distributions lies in the largest: 1 - x would leave nothing of the rest."""
    logits, teacher, target, grads = example(8, 50, torch.float32)
    logits[:, :4] += 25.0
    teacher[:, :4] += 25.0
    targets = largest(WholeTargets(teacher), 4)
    assert (targets.rest < 1e-6).all()
    q = softened(teacher, 1.0)
    torch.testing.assert_close(targets.rest.double(), 1 - q.topk(4).values.sum(-1), rtol=1e-4, atol=0)
    wanted = expected(logits, target, q, 1.0, grads, 4)
    check(logits, target, targets, wanted, grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_of_them_are_the_whole_distribution(dtype):
    logits, teacher, target, _ = example(12, 60, dtype)
    whole = WholeTargets(teacher, 2.0)
    one = vocab_parallel_distillation(logits.clone(), target, whole)
    other = vocab_parallel_distillation(logits.clone(), target, largest(whole, 60))
    torch.testing.assert_close(one[1], other[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_teacher_that_is_the_student(dtype, temperature):
    """No divergence, and only cross entropy's gradient."""
    logits, _, target, _ = example(10, 300, dtype)
    leaf, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    entropy, divergence = vocab_parallel_distillation(leaf, target, WholeTargets(logits, temperature))
    assert divergence.abs().max() < 1e-6
    (entropy + divergence).sum().backward()
    cross_entropy.vocab_parallel_cross_entropy(plain, target).sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad, **TOLERANCE[dtype])


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_z_loss_belongs_to_the_cross_entropy(k, dtype):
    """Its gradient alone, with that of the cross entropy."""
    logits, teacher, target, grads = example(12, 60, dtype)
    *losses, gradient = expected(logits, target, softened(teacher, 2.0), 2.0, grads, k)
    wide = logits.double().clone().requires_grad_()
    auxiliary = (grads[0].double() * 0.01 * wide.logsumexp(-1).square()).sum()
    wanted = (*losses, gradient + torch.autograd.grad(auxiliary, wide)[0])
    whole = WholeTargets(teacher, 2.0)
    check(logits, target, whole if k is None else largest(whole, k), wanted, grads, z_loss=0.01)


def joined(parts: list[Stats], temperature: float) -> Stats:
    """What combine_stats computes over processes."""
    top = torch.stack([part.top for part in parts]).amax(0)
    teacher_top = torch.stack([part.teacher_top for part in parts]).amax(0)
    sums = [torch.stack(_relative_to(part, top, teacher_top, temperature)) for part in parts]
    total, chosen, soft, teacher_total, cross, others = sum(sums)
    return Stats(top, total, chosen, soft, teacher_top, teacher_total, cross, others)


@pytest.mark.parametrize("k", [None, 5, 30])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [36, 25, 20, 13])
def test_shards_and_their_padding(vocab_size, dtype, k):
    """Three shards of 12 columns; the last ones may hold padding alone, and the teacher may shun one."""
    logits, teacher, _, grads = example(21, 36, dtype)
    target = torch.randint(vocab_size, (21,), generator=torch.Generator().manual_seed(3))
    if vocab_size > 12:
        teacher[:, :12] = -torch.inf
    q = softened(teacher[:, :vocab_size], 2.0)
    count = None if k is None else min(k, vocab_size)
    entropy, divergence, gradient = expected(logits[:, :vocab_size], target, q, 2.0, grads, count)
    logits[:, vocab_size:] = teacher[:, vocab_size:] = 50.0  # read by nobody
    whole = WholeTargets(teacher, 2.0)
    top = None if k is None else largest(whole, k, vocab_size=vocab_size)
    pieces = []
    for first in (0, 12, 24):
        part = logits[:, first : first + 12].contiguous()
        own = WholeTargets(teacher[:, first : first + 12].contiguous(), 2.0) if top is None else top
        pieces.append((part, own, first, cross_entropy.width_of_shard(12, first, vocab_size)))
    stats = joined([distillation_stats(part, target, *rest) for part, *rest in pieces], 2.0)
    bucket = None if top is None else top.rest.to(stats.top.dtype)
    found = losses_of(stats, bucket)
    close = dict(rtol=5e-6, atol=2e-5)
    torch.testing.assert_close(found[0].double(), entropy, **close)
    torch.testing.assert_close(found[1].double(), divergence, **close)
    factors = factors_of(stats, bucket, 2.0, *(g.to(stats.top.dtype) for g in grads))
    got = [
        distillation_grad_(part, target, own, first, stats, factors, width)
        for part, own, first, width in pieces
    ]
    got = torch.cat(got, dim=1)
    torch.testing.assert_close(got[:, :vocab_size].double(), gradient, **TOLERANCE[dtype])
    assert not got[:, vocab_size:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_that_are_missing_take_no_part(dtype):
    logits, teacher, target, _ = example(4, 20, dtype)
    few = largest(WholeTargets(teacher, 1.0), 6, vocab_size=4)
    assert (few.ids[:, 4:] == -1).all() and (few.rest == 0).all()
    same = TopTargets(few.ids[:, :4], few.logprobs[:, :4], few.rest)
    one, other = (vocab_parallel_distillation(logits.clone(), target, t, vocab_size=20) for t in (few, same))
    assert torch.equal(one[1], other[1])


@needs_kernels
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_broken_logits_give_a_broken_divergence(which):
    logits, teacher, target, _ = example(4, 40, torch.float32)
    (logits if which == "student" else teacher)[1, 3] = torch.nan
    _, divergence = vocab_parallel_distillation(logits, target, WholeTargets(teacher))
    assert divergence.isnan().tolist() == [False, True, False, False]


def test_backward_uses_the_logits_up():
    logits, teacher, target, _ = example(4, 20, torch.float32)
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1.0
    loss = sum(vocab_parallel_distillation(hidden, target, largest(WholeTargets(teacher), 3))).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(hidden.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="used the logits up"):
        loss.backward()


def test_the_largest_leave_the_logits_as_they_were():
    logits, teacher, target, _ = example(4, 20, torch.float32)
    before = logits.clone()
    vocab_parallel_distillation(logits, target, largest(WholeTargets(teacher), 3))
    assert torch.equal(logits, before)
