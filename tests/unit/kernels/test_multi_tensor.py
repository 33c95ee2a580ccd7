"""The gradient norm and scaling against torch's own."""

import pytest
import torch

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
