"""Plans: memory, time per step, suggested layouts."""

from dataclasses import replace

import pytest

from megatron_ext.config import describe
from megatron_ext.config.presets import preset
from megatron_ext.planning import plan

MODEL = preset("1.5b-pro")
H100 = plan.MACHINES["h100"]


def layout(**changes) -> describe.Layout:
    values = dict(data=8, distributed_optimizer=True, micro_batch=4, micro_batches=32, bytes_each=2)
    return describe.Layout(**values | changes)


def test_what_fits():
    assert plan.fits(MODEL, layout(), H100)
    assert not plan.fits(MODEL, layout(micro_batch=64), H100)
    assert plan.fits(MODEL, layout(micro_batch=64, recompute=True), H100)


def test_a_step_of_one_device_is_its_matmuls():
    seconds = plan.step_seconds(MODEL, layout(data=1), H100)
    tokens = 4 * 32 * 2048
    assert seconds["computation"] == MODEL.flops_per_token(2048) * tokens / H100.flops
    assert seconds["tensor parallel"] == seconds["pipeline idle"] == seconds["data parallel"] == 0


def test_links_and_idle_time():
    alone, split = (plan.step_seconds(MODEL, layout(data=1, tensor=t), H100) for t in (1, 2))
    assert split["computation"] == alone["computation"] / 2
    assert split["tensor parallel"] > 0
    piped = plan.step_seconds(MODEL, layout(data=1, pipeline=2), H100)
    assert piped["pipeline idle"] == piped["computation"] / 32
    slow = replace(H100, far=1e9, near=1e9)
    exposed, hidden = (
        plan.step_seconds(MODEL, layout(), slow, overlap)["data parallel"] for overlap in (0, 1)
    )
    assert exposed == pytest.approx(7 / 8 * 6 * MODEL.num_parameters / 1e9)
    assert 0 < hidden < exposed


def test_suggestions_use_every_device_and_fit():
    found = list(plan.suggestions(MODEL, 16, 1024, H100, 2048))
    times = [seconds for seconds, _ in found]
    assert times == sorted(times) and len(found) > 20
    for _, layout in found:
        assert layout.tensor * layout.pipeline * layout.data == 16
        assert layout.micro_batch * layout.micro_batches * layout.data == 1024
        assert plan.fits(MODEL, layout, H100)
    best = found[0][1]
    assert (best.tensor, best.pipeline, best.data, best.recompute) == (1, 1, 16, False)


def test_a_model_too_large_for_a_device_is_divided():
    large = replace(MODEL, num_layers=64, hidden_size=8192, num_attention_heads=64, ffn_hidden_size=22016)
    seconds, best = next(plan.suggestions(large, 64, 1024, H100, 2048))
    assert best.tensor * best.pipeline > 1
    assert not list(plan.suggestions(large, 1, 1024, H100, 2048))
