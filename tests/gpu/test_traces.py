"""The same run on CPU and GPU, local layers and Transformer Engine's, bf16 and FP8, and across a resume."""

import pytest
import torch

from megatron_ext.platform import engine
from tests.functional.test_resume import tensors
from tests.gpu.traces import LONG, WIDE, column, needs_engine, needs_gpu, needs_recipe, run

ITERATIONS = 16
HALF = dict(impl="transformer_engine", bf16=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def reference(folder):
    """fp32 on the CPU."""
    return run(folder, "cpu", ITERATIONS, device="cpu")


@needs_gpu
def test_fp32_on_a_gpu_is_fp32_on_a_cpu(folder, reference):
    found = run(folder, "cuda", ITERATIONS)
    assert column(found) == pytest.approx(column(reference), rel=1e-4)
    assert column(found, "grad_norm") == pytest.approx(column(reference, "grad_norm"), rel=1e-3)


@needs_gpu
@needs_engine
def test_fp32_with_transformer_engine(folder, reference):
    """Its matmuls of fp32 may take TF32 units, with 10 bits of fraction."""
    found = run(folder, "engine", ITERATIONS, impl="transformer_engine")
    assert column(found) == pytest.approx(column(reference), rel=2e-3)


@needs_gpu
@pytest.mark.parametrize("impl", ["local", pytest.param("transformer_engine", marks=needs_engine)])
def test_bf16_is_near_fp32(folder, reference, impl):
    found = run(folder, f"bf16-{impl}", ITERATIONS, impl=impl, bf16=True)
    assert column(found) == pytest.approx(column(reference), rel=2e-2)


@needs_gpu
def test_modules_off_and_on_are_the_same_at_step_0(folder, reference):
    plain = run(folder, "plain", 1, bf16=False, series_activation_order=0, augmented_shortcuts=0)
    assert column(plain)[0] == pytest.approx(column(reference)[0], rel=1e-4)


@pytest.fixture(scope="module")
def half(folder):
    """bf16 with Transformer Engine, long enough to learn something."""
    found = run(folder, "bf16-long", LONG, **HALF, **WIDE)
    assert end(found) < column(found)[0] - 0.5
    return found


def end(records: list[dict]) -> float:
    """The loss at the end of a run."""
    return sum(column(records)[-20:]) / 20


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=needs_recipe(name)) for name in engine.RECIPES])
def test_fp8_ends_within_a_percent_of_bf16(folder, half, recipe):
    eight = run(folder, f"fp8-{recipe}", LONG, fp8_format="hybrid", fp8_recipe=recipe, **HALF, **WIDE)
    assert end(eight) == pytest.approx(end(half), rel=0.01)


@needs_recipe("tensorwise")
def test_fp8_parameters_start_from_the_same_weights(folder):
    eight = dict(use_distributed_optimizer=True, fp8_format="hybrid", fp8_recipe="tensorwise")
    whole, gathered = (
        run(folder, f"gather-{on}", ITERATIONS, **HALF, **eight, fp8_param_gather=on) for on in (False, True)
    )
    assert column(gathered) == pytest.approx(column(whole), rel=1e-2)


@needs_gpu
@pytest.mark.parametrize("impl", ["local", pytest.param("transformer_engine", marks=needs_engine)])
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_checkpoint_goes_on_on_the_other_device(folder, reference, first, impl):
    second = "cuda" if first == "cpu" else "cpu"
    impls = {"cpu": "local", "cuda": impl}
    place = folder / f"from-{first}-{impl}"
    stop = dict(exit_interval=8, save=place, save_interval=8)
    run(folder, f"begin-{first}-{impl}", ITERATIONS, device=first, impl=impls[first], **stop)
    found = run(folder, f"end-{second}-{impl}", ITERATIONS, device=second, impl=impls[second], load=place)
    assert [record["iteration"] for record in found] == list(range(9, ITERATIONS + 1))
    tolerance = 1e-4 if impl == "local" else 2e-3
    assert column(found) == pytest.approx(column(reference)[8:], rel=tolerance)


@needs_gpu
@needs_engine
def test_captured_layers_compute_the_same(folder):
    values = dict(impl="transformer_engine", bf16=True)
    plain = run(folder, "eager", ITERATIONS, **values)
    graphs = run(folder, "graphs", ITERATIONS, cuda_graph_impl="local", cuda_graph_warmup_steps=2, **values)
    assert column(graphs) == pytest.approx(column(plain), rel=1e-3)


@needs_gpu
def test_a_background_save_is_what_a_save_in_the_way_is(folder, monkeypatch):
    """Copied from the device beside the next iteration: every tensor of every checkpoint, bit for bit."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name, more in (("in-the-way", {}), ("background", dict(async_save=True))):
        run(folder, name, 6, deterministic_mode=True, save=folder / f"{name}-saves", save_interval=1, **more)
    for iteration in range(1, 7):
        expected, found = (
            tensors(folder / f"{name}-saves", iteration) for name in ("in-the-way", "background")
        )
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), iteration
