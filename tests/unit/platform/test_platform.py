"""The platform layer: every seam matches, and nothing outside of Megatron-Core changes."""

import importlib
import importlib.machinery
import importlib.util

import pytest
import torch

from megatron_ext import platform
from megatron_ext.kernels.multi_tensor import multi_tensor_l2_norm
from megatron_ext.platform import loader, seams

cpu_only = pytest.mark.skipif(platform.on_gpu(), reason="the seams serve the CPU; a GPU needs none")


def upstream_code(module: str):
    spec = importlib.util.find_spec(f"megatron.core.{module}")
    plain = importlib.machinery.SourceFileLoader(spec.name, spec.origin)
    return plain.get_code(spec.name)


@pytest.mark.parametrize("seam", seams.installed_seams().values(), ids=lambda seam: seam.module)
def test_seam_finds_its_place_in_upstream(seam):
    found: set[str] = set()
    loader.rewrite(upstream_code(seam.module), seam, found)
    constants, names, functions = seam.constants or {}, seam.names or {}, seam.functions or {}
    wanted = set(names) | (set(constants) - set(seams.TENSOR_TYPES))
    if set(constants) & set(seams.TENSOR_TYPES):
        wanted.add("torch.cuda.FloatTensor")
    assert wanted <= found, f"{seam.module} no longer says {wanted - found}"
    module = importlib.import_module(f"megatron.core.{seam.module}")
    for name in functions:
        assert hasattr(module, name)


@cpu_only
@pytest.mark.parametrize("seam", seams.installed_seams().values(), ids=lambda seam: seam.module)
def test_loaded_module_no_longer_says_it(seam):
    module = importlib.import_module(f"megatron.core.{seam.module}")
    assert isinstance(module.__loader__, loader.CpuLoader)
    found: set[str] = set()
    loader.rewrite(module.__loader__.get_code(module.__name__), seam, found)
    assert not found


@cpu_only
def test_view_is_given_to_megatron_core_alone():
    from megatron.core import parallel_state

    assert parallel_state.torch is not torch
    assert parallel_state.torch.cuda.current_device() == torch.device("cpu")
    assert not isinstance(torch.cuda, type(parallel_state.torch.cuda))
    assert importlib.import_module("torch") is torch
    assert parallel_state.torch.Tensor is torch.Tensor


@cpu_only
def test_generator_of_the_device_is_the_cpu_generator():
    from megatron.core.tensor_parallel import random

    torch.manual_seed(7)
    state = random._get_cuda_rng_state()
    expected = torch.rand(3)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), expected)


def test_dropout_on_a_cpu_warns_of_nothing(single_process, caplog):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    with get_cuda_rng_tracker().fork():
        torch.rand(1)
    assert caplog.text == ""


def test_the_gradient_norm_is_exact_where_fp32_is_not():
    values = torch.full((4_000_003,), 0.1)
    exact = values.double().square().sum().item()
    norm, _ = multi_tensor_l2_norm(0, None, [[values, torch.zeros(0), 2 * values]], False)
    assert norm.item() == pytest.approx((5 * exact) ** 0.5, rel=1e-7)


def refusal_of(device: str) -> str:
    with pytest.raises(platform.PlatformError) as refused:
        platform.activate(device)
    return str(refused.value)


@cpu_only
def test_refusals(monkeypatch):
    assert "already runs on cpu" in refusal_of("cuda")
    assert "must be auto, cpu or cuda" in refusal_of("tpu")
    monkeypatch.setattr(platform.device, "_device_type", None)
    assert "torch sees no GPU" in refusal_of("cuda")
    monkeypatch.setattr(loader, "imported_too_early", lambda: ["megatron.core.utils"])
    assert "megatron.core.utils was imported before megatron_ext" in refusal_of("cpu")
    monkeypatch.setattr(platform.device.engine, "version_of", lambda name: "0.99.0")
    assert "megatron-core 0.99.0 is installed, but this program is tested with 0.16.1" in refusal_of("cpu")
    monkeypatch.setattr(platform.device.engine, "version_of", lambda name: None)
    assert "megatron-core is not installed" in refusal_of("cpu")


def test_a_version_that_was_tried_runs_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(platform.device.engine, "version_of", lambda name: "0.19.2")
    platform.check_megatron_core_version()
    assert "megatron-core 0.19.2" in caplog.text and "docs/engine.md" in caplog.text
