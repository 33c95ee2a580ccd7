"""Generators in a checkpoint: on the same device, on another kind of device, with CUDA graphs."""

import io
import random

import numpy
import pytest
import torch
from megatron.core import tensor_parallel

from megatron_ext.checkpoint import content
from megatron_ext.checkpoint.safe import load_object


@pytest.fixture
def tracker(single_process):
    """Megatron-Core's tracker, seeded."""
    return tensor_parallel.get_cuda_rng_tracker()


def saved_and_read(states: list[dict]) -> list[dict]:
    """The states as loaded from a checkpoint."""
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return load_object(file)


def host_draws() -> list[float]:
    """The next numbers of Python's and NumPy's generators."""
    return [random.random(), numpy.random.rand()]


def dropout_draws(tracker) -> list[torch.Tensor]:
    """The next numbers of every generator of the tracker."""
    found = []
    for kept in tracker.get_states().values():
        generator = kept if isinstance(kept, torch.Generator) else torch.Generator()
        if kept is not generator:
            generator.set_state(kept)
        found.append(torch.rand(4, generator=generator))
    return found


@pytest.mark.parametrize("graphs_before", [False, True], ids=["states", "generators"])
@pytest.mark.parametrize("graphs_after", [False, True], ids=["to-states", "to-generators"])
def test_a_run_goes_on_with_the_same_numbers(tracker, graphs_before, graphs_after):
    """With CUDA graphs the tracker holds generators; their states are saved."""
    names = list(tracker.get_states())
    assert names

    def use(generators: bool, seed: int) -> None:
        made = {name: torch.Generator().manual_seed(seed + i) for i, name in enumerate(names)}
        tracker.set_states(made if generators else {name: g.get_state() for name, g in made.items()})

    use(graphs_before, seed=1)
    states = saved_and_read(content.gather_rng())
    expected = [host_draws(), torch.rand(3), dropout_draws(tracker)]
    use(graphs_after, seed=100)
    before = tracker.get_states()
    content.restore_rng(states)
    if graphs_after:
        assert all(tracker.get_states()[name] is before[name] for name in names)
    found = [host_draws(), torch.rand(3), dropout_draws(tracker)]
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    assert all(map(torch.equal, found[2], expected[2]))


@pytest.mark.parametrize("upstream", [False, True], ids=["ours", "of-megatron-lm"])
def test_states_of_another_kind_of_device_are_left_alone(tracker, caplog, upstream):
    """A GPU's state has 16 bytes, a CPU's 5,056; the host's generators are restored."""
    (own,) = content.gather_rng()
    expected = host_draws()
    foreign = torch.zeros(16, dtype=torch.uint8)
    own["cuda_rng_state"] = foreign
    own["rng_tracker_states"] = {name: foreign for name in own["rng_tracker_states"]}
    if upstream:
        own["rng_tracker_states"] |= {"expert-parallel-rng": foreign}
    before = tracker.get_states()
    content.restore_rng(saved_and_read([own]))
    assert host_draws() == expected
    assert tracker.get_states() == before
    assert "another kind of device" in caplog.text
