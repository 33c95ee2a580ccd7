"""The gradient norm and scaling against torch's own."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.kernels import fused, multi_tensor

needs_kernels = pytest.mark.skipif(not fused.available(), reason="megatron_ext._kernels was not built")
SIZES = (1, 7, 33, 40_001, 0)


def tensors(seed: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sum_of_squares_and_scale(dtype):
    values = [t.to(dtype) for t in tensors(3)]
    exact = sum(float(t.double().square().sum()) for t in values)
    assert multi_tensor.sum_of_squares(values) == pytest.approx(exact, rel=1e-13)
    doubled = [2 * t for t in values]
    multi_tensor.scale_(values, 2.0)
    assert all(map(torch.equal, values, doubled))
    assert multi_tensor.sum_of_squares([]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by the kernel, in plain PyTorch
def test_sum_of_squares_where_float32_fails(dtype):
    large = torch.full((4_000_000,), 1.1, dtype=dtype)
    exact = 4_000_000 * float(large[0].double()) ** 2
    assert multi_tensor.sum_of_squares([large]) == pytest.approx(exact, rel=1e-12)
    assert multi_tensor.sum_of_squares([torch.full((3,), 1e30)]) == pytest.approx(3e60, rel=1e-6)
    assert multi_tensor.sum_of_squares([torch.tensor([1.0, torch.inf])]) == torch.inf


@needs_kernels
def test_sum_of_squares_for_any_number_of_threads():
    values, before = tensors(5) + [torch.randn(300_000)], torch.get_num_threads()
    found = set()
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.add(multi_tensor.sum_of_squares(values))
    torch.set_num_threads(before)
    assert len(found) == 1


@needs_kernels
def test_writes_are_seen_by_autograd():
    weight = torch.ones(5, requires_grad=True)
    loss = weight.square().sum()
    multi_tensor.scale_([weight], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class CountWaits(TorchDispatchMode):
    """Counts how often the host reads a number of the device."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_gpu_clips_without_waiting(monkeypatch, single_process):
    """The norm is read once, for the report; Megatron-Core's own reads that of every gradient."""
    from megatron.core.optimizer import clip_grads

    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n, 3)) for n in range(1, 40)]
    gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", multi_tensor.foreach_l2_norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", multi_tensor.foreach_scale)
    with CountWaits() as count:
        norm = clip_grads.get_grad_norm_fp32([p.grad for p in parameters])
        clip_grads.clip_grad_by_total_norm_fp32(parameters, 0.5, norm)
    assert count.waits == 1
    expected = torch.cat(gradients).double().norm().item()
    assert norm == pytest.approx(expected, rel=1e-6)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * (0.5 / expected))


def test_half_precision_gradients_have_a_norm_in_float32():
    tensors = [torch.full((300,), 300.0, dtype=torch.float16) for _ in range(2)]  # the sum overflows fp16
    norm, _ = multi_tensor.foreach_l2_norm(0, None, [tensors], False)
    assert norm.dtype == torch.float32 and norm.shape == (1,)
    assert norm.item() == pytest.approx(300 * 600**0.5, rel=1e-6)


def test_another_engines_functions_stay(monkeypatch):
    """Transformer Engine's and Apex's functions are not replaced, Megatron-Core's own are."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    theirs = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", theirs)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", theirs)
    multi_tensor.provide_multi_tensor()
    assert clip_grads.l2_norm_impl is theirs and clip_grads.multi_tensor_scale_impl is theirs
    monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    multi_tensor.provide_multi_tensor()
    assert clip_grads.l2_norm_impl is multi_tensor.foreach_l2_norm
    assert clip_grads.multi_tensor_scale_impl is multi_tensor.foreach_scale
