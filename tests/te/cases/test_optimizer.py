"""Transformer Engine's Adam beside ours: the same groups, and each keeps what is its own."""

import pytest

from megatron_ext.checkpoint import load_checkpoint, save_checkpoint
from tests.helpers.parallel import Layout
from tests.te.cases.machines import optimizer_class, run

#: What a step of Transformer Engine's Adam reads and ours has not.
ITS_OWN = {"bias_correction"}


def groups(made) -> list[dict]:
    """The parameter groups, with the number of parameters for the parameters."""
    inner = made.optimizer.chained_optimizers[0].optimizer
    return [{**group, "params": len(group["params"])} for group in inner.param_groups]


def groups_of_both(flags: tuple) -> list[list[dict]]:
    """The groups after a step, with our Adam and with Transformer Engine's."""
    return [groups(run(Layout(), engine, flags).train(1)) for engine in (False, True)]


@pytest.mark.parametrize("flags", [(), ("--bf16",), ("--use-distributed-optimizer",)], ids=str)
def test_the_same_groups(pool, flags):
    ((ours, theirs),) = pool.run(Layout(), groups_of_both, flags)
    assert len(ours) == len(theirs) == 2
    for own, other in zip(ours, theirs, strict=True):
        assert set(other) - set(own) == ITS_OWN and set(own) <= set(other)
        assert {key: other[key] for key in own} == own


def keys_after_loading(folder: str, saved_by_engine: bool, flags: tuple) -> tuple[list, list]:
    """The keys of the groups before and after loading what the other machine saved."""
    first = run(Layout(), saved_by_engine, flags).train(1)
    save_checkpoint(folder, 1, run_state=first.run_state, **first.parts).finish()
    second = run(Layout(), not saved_by_engine, flags)
    before = [set(group) for group in groups(second)]
    load_checkpoint(folder, **second.parts)
    second.iteration = 1
    second.train(1)
    assert "bias_correction" not in before[0] or optimizer_class(second).__module__.startswith("transformer")
    return before, [set(group) for group in groups(second)]


@pytest.mark.parametrize("flags", [(), ("--bf16",), ("--use-distributed-optimizer",)], ids=str)
@pytest.mark.parametrize("saved_by_engine", [False, True], ids=["ours-to-theirs", "theirs-to-ours"])
def test_a_key_that_the_checkpoint_lacks_stays(pool, tmp_path, saved_by_engine, flags):
    ((before, after),) = pool.run(Layout(), keys_after_loading, str(tmp_path), saved_by_engine, flags)
    for own, loaded in zip(before, after, strict=True):
        assert own <= loaded
