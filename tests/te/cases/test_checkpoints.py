"""A run that changes between the local layers without Transformer Engine and the latter's, at its saves."""

import pytest

from megatron_ext.checkpoint import load_checkpoint, save_checkpoint
from tests.helpers.parallel import Layout
from tests.te.cases.machines import run

STEPS = 2


def leg(folder: str, layout: Layout, engine: bool, flags: tuple, start: int, steps: int) -> list[float]:
    """Go on from iteration ``start``, if it is not 0, and save; the losses."""
    made = run(layout, engine, flags)
    if start:
        loaded = load_checkpoint(folder, **made.parts)
        assert (loaded.iteration, loaded.optimizer_loaded, loaded.rng_loaded) == (start, True, True)
        made.iteration = start
    made.train(steps)
    save_checkpoint(folder, made.iteration, run_state=made.run_state, **made.parts).finish()
    return made.losses


def whole_and_changing(folder: str, layout: Layout, first: bool, flags: tuple) -> tuple[list, list]:
    """The losses of a run that stays what it is, and of one that changes after every two steps."""
    whole = run(layout, first, flags).train(3 * STEPS).losses
    changing = []
    for number, engine in enumerate((first, not first, first)):
        changing += leg(folder, layout, engine, flags, number * STEPS, STEPS)
    return whole, changing


DISTRIBUTED = ("--use-distributed-optimizer",)
CASES = {
    "fp32": (Layout(), False, (), 1e-6),
    "fp32-engine-first": (Layout(), True, (), 1e-6),
    "tp2": (Layout(tp=2), False, ("--sequence-parallel",), 1e-6),
    "distributed": (Layout(dp=2), True, DISTRIBUTED, 1e-6),
    "bf16": (Layout(), True, ("--bf16",), 1e-2),
    "bf16-distributed": (Layout(dp=2), False, ("--bf16", *DISTRIBUTED), 1e-2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_with_other_layers(pool, tmp_path, case):
    layout, first, flags, tolerance = CASES[case]
    for whole, changing in pool.run(layout, whole_and_changing, str(tmp_path), layout, first, flags):
        assert changing == pytest.approx(whole, rel=tolerance)
