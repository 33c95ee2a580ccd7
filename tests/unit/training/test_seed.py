"""The random generators of a run."""

import pytest
import torch

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.training import distributed


@pytest.mark.parametrize(
    ("graphs", "impl", "expected"),
    [
        ("none", "local", (False, False)),
        ("none", "transformer_engine", (False, False)),
        ("local", "local", (False, True)),
        ("local", "transformer_engine", (True, True)),
    ],
)
def test_graphs_have_generators_that_they_can_carry_on(single_process, monkeypatch, graphs, impl, expected):
    seen = []

    def seeded(value: int, te_rng_tracker: bool, use_cudagraphable_rng: bool) -> None:
        seen.append((te_rng_tracker, use_cudagraphable_rng))

    monkeypatch.setattr(distributed, "model_parallel_cuda_manual_seed", seeded)
    distributed.seed(RunConfig.of(dict(seed=1, cuda_graph_impl=graphs, transformer_impl=impl)))
    assert seen == [expected]


def test_measuring_the_machine_leaves_the_generators_alone(single_process):
    """Only one rank measures: its dropout would differ from the other ranks', and after a resume."""
    from megatron_ext.training.metrics import measured_flops

    before = platform.rng_state()["device"].clone(), torch.get_rng_state()
    assert measured_flops(torch.float32, seconds=0.01) > 0
    assert torch.equal(platform.rng_state()["device"], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
