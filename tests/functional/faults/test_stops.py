"""Signals at any time: all ranks save and stop orderly, and the resumed run has the same trace."""

import json
import os
import random
import signal
import time

import pytest
import torch

from megatron_ext.training import batch
from tests.functional.test_run import BASE
from tests.helpers.faults import Fuse, facts, fused_run, newest_whole, steps_in
from tests.helpers.pool import WorkerError
from tests.helpers.training import _pretrain, flags

STOPS = int(os.environ.get("FAULT_STOPS", 6))
SEED = os.environ.get("FAULT_SEED", "0")
RUN = BASE | dict(
    train_iters=8, save_interval=3, eval_iters=2, eval_interval=2, attention_dropout=0.1, hidden_dropout=0.1
)
TERM = (signal.SIGTERM,)


def run_flags(folder, **changes) -> list[str]:
    return flags(**RUN | dict(save=folder, load=folder, metrics_file=folder.with_suffix(".jsonl")) | changes)


def validations(folder) -> dict[tuple, float]:
    records = [json.loads(line) for line in folder.with_suffix(".jsonl").read_text().splitlines()]
    return {(r["iteration"], r["split"]): r["lm_loss"] for r in records if "split" in r}


@pytest.fixture(scope="module")
def whole(pool, tmp_path_factory):
    """The uninterrupted trace: iterations and validations."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pool.run(2, fused_run, run_flags(folder), None, timeout=240)
    return {step["iteration"]: facts(step) for step in steps_in(folder.with_suffix(".jsonl"))}, validations(
        folder
    )


def assert_is_whole(pool, folder, whole) -> None:
    """Finish the run; every iteration and validation equals that of the uninterrupted run."""
    pool.run(2, fused_run, run_flags(folder), None, timeout=240)
    trace, evaluated = whole
    found = steps_in(folder.with_suffix(".jsonl"))
    assert [step["iteration"] for step in found] == list(trace)  # none lost, none done twice
    assert all(facts(step) == trace[step["iteration"]] for step in found)
    assert validations(folder) == evaluated


@pytest.mark.parametrize("rank", [0, 1])
def test_in_the_middle_of_a_validation(pool, tmp_path, whole, rank):
    """A validation is cut short, and repeated first when the run resumes."""
    folder = tmp_path / "run"
    pool.run(2, fused_run, run_flags(folder), Fuse(rank, "evaluating", 2, signals=TERM))
    assert newest_whole(folder) == 2 and (2, "validation") not in validations(folder)
    assert_is_whole(pool, folder, whole)


def test_in_a_save(pool, tmp_path, whole):
    folder = tmp_path / "run"
    pool.run(
        2,
        fused_run,
        run_flags(folder),
        Fuse(0, str(folder), 4, signals=(signal.SIGUSR1,), begins="a training step"),
    )
    assert newest_whole(folder) in (3, 4)
    assert_is_whole(pool, folder, whole)


def test_while_waiting_for_data(pool, tmp_path, whole):
    folder = tmp_path / "run"
    pool.run(2, slow_data, run_flags(folder), Fuse(1, "waiting for data", 5, signals=TERM), 1.0)
    assert newest_whole(folder) == 2
    assert_is_whole(pool, folder, whole)


def slow_data(argv: list[str], fuse: Fuse, seconds: float) -> None:
    """The fifth microbatch takes ``seconds`` to come."""
    count, original = 0, batch.next_batch

    def slow(iterator):
        nonlocal count
        count += 1
        if count == 5:
            time.sleep(seconds)
        return original(iterator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "next_batch", slow)
        fused_run(argv, fuse)


def test_at_random_times(pool, tmp_path, whole):
    rng = random.Random(SEED)
    for number in range(STOPS):
        folder = tmp_path / f"run{number}"
        fuse = Fuse(
            rng.randrange(2),
            rng.choice(["a training step", "waiting for data", "evaluating", "saving", str(folder)]),
            rng.randint(1, 4),
            rng.choice([0.0, rng.uniform(0, 0.1)]),
            (rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]),),
            begins="a training step",  # in set-up there is nothing to save, and a signal ends the process
        )
        pool.run(2, fused_run, run_flags(folder), fuse, timeout=240)
        assert newest_whole(folder) >= 1
        assert_is_whole(pool, folder, whole)


def stuck_in_a_collective(argv: list[str], fuse: Fuse, log: str) -> None:
    """Rank 1 never reads its sixth microbatch: rank 0 waits for it in a collective."""
    if torch.distributed.get_rank() == 0:
        return fused_run(argv, fuse, log)
    count, original = 0, batch.next_batch

    def stuck(iterator):
        nonlocal count
        count += 1
        if count == 6:
            time.sleep(1000)
        return original(iterator)

    batch.next_batch = stuck
    fused_run(argv, None)  # connects as rank 0 does


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_even_in_a_collective(pool, tmp_path, number):
    folder = tmp_path / "run"
    fuse = Fuse(0, "a training step", 7, 0.5, signals=(number, number), apart=2.2)
    argv = run_flags(folder, save_interval=1, eval_iters=0)
    started = time.monotonic()
    with pytest.raises(
        WorkerError, match=f"rank 0 of 2 failed: the process died with exit code {128 + number}"
    ):
        pool.run(2, stuck_in_a_collective, argv, fuse, str(tmp_path / "log"), timeout=120, grace=0.2)
    first, second = (tmp_path / "log0").read_text().splitlines()
    assert first == f"received {number.name}: stopping in order; a second one ends the run at once"
    assert second == f"second signal ({number.name}): ending without a save"
    assert time.monotonic() - started < 60
    assert newest_whole(folder) == 2


def test_a_signal_that_the_launcher_passes_on_is_not_a_second_one(pool, tmp_path):
    folder = tmp_path / "run"
    fuse = Fuse(0, "a training step", 5, signals=(signal.SIGTERM, signal.SIGTERM), apart=0.01)
    pool.run(2, fused_run, run_flags(folder), fuse, timeout=240)
    assert newest_whole(folder) == 2


def test_a_time_limit_saves(pool, tmp_path):
    folder = tmp_path / "run"
    argv = run_flags(folder, train_iters=100_000, lr_decay_iters=8, exit_duration_in_mins=1)
    pool.run(2, hurried_run, argv, timeout=200)
    assert 1 <= newest_whole(folder) < 100_000


def hurried_run(argv: list[str]) -> None:
    """A minute of the limit lasts a second here."""
    from megatron_ext.training import stopping

    beginning, clock = time.time(), time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping.time, "time", lambda: beginning + 60 * (clock() - beginning))
        _pretrain(argv)
