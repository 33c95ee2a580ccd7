"""The flat AdamW, gradient norm and scaling against torch's own."""

import pytest
import torch

from megatron_ext.models import fused, fused_optimizer

needs_kernels = pytest.mark.skipif(not fused.available(), reason="megatron_ext._kernels was not built")
SIZES = (1, 7, 33, 40_001, 0)
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def tensors(seed: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


def zeros() -> list[torch.Tensor]:
    return [torch.zeros(size) for size in SIZES]


@pytest.mark.parametrize("by_kernel", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs(by_kernel, grad_dtype):
    step_function = fused_optimizer.adamw_ if by_kernel else fused_optimizer.adamw_reference
    params, m, v = tensors(0), zeros(), zeros()
    copies = [p.bfloat16() for p in params]
    theirs = [torch.nn.Parameter(p.double()) for p in params]
    optimizer = torch.optim.AdamW(theirs, **OPTIONS, foreach=False)
    for step in range(1, 6):
        grads = tensors(step, grad_dtype)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.double() * 0.5
        optimizer.step()
        step_function(params, grads, m, v, copies, step=step, grad_scale=0.5, **OPTIONS)
    for ours, want, copy in zip(params, theirs, copies, strict=True):
        torch.testing.assert_close(ours.double(), want.detach(), rtol=1e-6, atol=5e-7)
        assert torch.equal(copy, ours.bfloat16())


@needs_kernels
def test_adamw_stays_with_torchs_fused_one_in_float32():
    params, m, v = tensors(0), zeros(), zeros()
    theirs = [torch.nn.Parameter(p.clone()) for p in params if p.numel()]
    optimizer = torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in range(1, 11):
        grads = tensors(step)
        for parameter, grad in zip(theirs, grads, strict=False):
            parameter.grad = grad.clone()
        optimizer.step()
        fused_optimizer.adamw_(params, grads, m, v, step=step, **OPTIONS)
    for ours, want in zip(params, theirs, strict=False):
        torch.testing.assert_close(ours, want.detach(), rtol=1e-6, atol=5e-7)


@needs_kernels
def test_adamw_carries_nan_and_checks_sizes():
    params, grads = [torch.ones(40)], [torch.zeros(40)]
    grads[0][33] = torch.nan
    fused_optimizer.adamw_(params, grads, [torch.zeros(40)], [torch.zeros(40)], step=1, **OPTIONS)
    assert params[0].isnan().nonzero().tolist() == [[33]]
    with pytest.raises(ValueError, match="every list"):
        fused_optimizer.adamw_(
            params, [torch.zeros(39)], [torch.zeros(40)], [torch.zeros(40)], step=1, **OPTIONS
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sum_of_squares_and_scale(dtype):
    values = [t.to(dtype) for t in tensors(3)]
    exact = sum(float(t.double().square().sum()) for t in values)
    assert fused_optimizer.sum_of_squares(values) == pytest.approx(exact, rel=1e-13)
    doubled = [2 * t for t in values]
    fused_optimizer.scale_(values, 2.0)
    assert all(map(torch.equal, values, doubled))
    assert fused_optimizer.sum_of_squares([]) == 0.0


@needs_kernels
def test_sum_of_squares_where_float32_fails():
    large = torch.full((4_000_000,), 1.1)
    exact = 4_000_000 * float(large[0].double()) ** 2
    assert fused_optimizer.sum_of_squares([large]) == pytest.approx(exact, rel=1e-12)
    assert fused_optimizer.sum_of_squares([torch.full((3,), 1e30)]) == pytest.approx(3e60, rel=1e-6)
    assert fused_optimizer.sum_of_squares([torch.tensor([1.0, torch.inf])]) == torch.inf


@needs_kernels
def test_sum_of_squares_for_any_number_of_threads():
    values, before = tensors(5) + [torch.randn(300_000)], torch.get_num_threads()
    found = set()
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.add(fused_optimizer.sum_of_squares(values))
    torch.set_num_threads(before)
    assert len(found) == 1


@needs_kernels
def test_writes_are_seen_by_autograd():
    weight = torch.ones(5, requires_grad=True)
    loss = weight.square().sum()
    fused_optimizer.scale_([weight], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
