"""Weight gradients summed in place where Apex is missing, and how torch's way to do it is found."""

import pytest
import torch
from megatron.core.tensor_parallel import layers

from megatron_ext.kernels import weight_gradient

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def afresh():
    """Nothing is remembered from or for other tests."""
    weight_gradient.adds_in_fp32.cache_clear()
    yield
    weight_gradient.adds_in_fp32.cache_clear()


def in_fp32(total, a, b, *, out_dtype, out):
    """What a GPU's torch does."""
    assert out_dtype == torch.float32
    out.copy_(total + a.float() @ b.float())


def refused(total, a, b, **more):
    """What torch says on a CPU, or before 2.8."""
    raise TypeError("addmm() received an invalid combination of arguments")


def not_summed(total, a, b, *, out_dtype, out):
    """An ``out`` that may not be the summand as well."""
    out.copy_(a.float() @ b.float())


def rounded(total, a, b, *, out_dtype, out):
    """A sum that is rounded to half precision."""
    out.copy_((total.to(a.dtype) + a @ b).float())


def adding(monkeypatch, addmm) -> bool:
    monkeypatch.setattr(torch, "addmm", addmm)
    return weight_gradient.adds_in_fp32(torch.bfloat16, CPU)


def test_the_way_of_a_gpu_is_taken_only_where_it_is_right(monkeypatch):
    assert adding(monkeypatch, in_fp32)
    for wrong in (refused, not_summed, rounded):
        weight_gradient.adds_in_fp32.cache_clear()
        assert not adding(monkeypatch, wrong), wrong.__name__


@pytest.mark.parametrize("addmm", [in_fp32, refused, not_summed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_right_either_way(monkeypatch, addmm, dtype):
    monkeypatch.setattr(torch, "addmm", addmm)
    grad, x = (torch.randint(-4, 5, (6, n)).to(dtype) for n in (5, 3))
    total = torch.rand(5, 3)
    expected = total + grad.float().t() @ x.float()
    weight_gradient.WeightGradients.wgrad_gemm_accum_fp32(x, grad, total)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)


def test_it_stands_in_for_apex_alone(monkeypatch):
    apex = object()
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", apex)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    weight_gradient.provide_weight_gradients()
    assert layers.fused_weight_gradient_mlp_cuda is apex
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    weight_gradient.provide_weight_gradients()
    assert layers.fused_weight_gradient_mlp_cuda is weight_gradient.WeightGradients
    assert layers._grad_accum_fusion_available
