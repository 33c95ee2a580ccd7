"""A few iterations with each kind of layer, saved and gone on from: to try first on a new machine."""

import math

import pytest

from tests.gpu.traces import column, needs_engine, needs_gpu, run


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("impl", ["local", pytest.param("transformer_engine", marks=needs_engine)])
def test_it_learns_saves_and_goes_on(tmp_path, impl, precision):
    values = dict(impl=impl, bf16=precision == "bf16", use_distributed_optimizer=True)
    place = dict(save=tmp_path / "saves", save_interval=4)
    begin = run(tmp_path, f"smoke-{impl}-{precision}", 8, exit_interval=4, **place, **values)
    end = run(tmp_path, f"smoke-{impl}-{precision}-end", 8, load=tmp_path / "saves", **place, **values)
    losses = column(begin) + column(end)
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
