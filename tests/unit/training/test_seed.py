"""The random generators of a run."""

import pytest

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
