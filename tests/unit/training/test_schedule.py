"""Schedules of a run and of a checkpoint: differences in the flags' units, and the resumed position."""

from argparse import Namespace

import pytest

from megatron_ext.arguments.parser import read_args
from megatron_ext.common.errors import RunError
from megatron_ext.config import RunConfig
from megatron_ext.training.schedule import build_scheduler, differences, without_a_rate

BASE = (
    "--model-preset tiny --tokenizer-type NullTokenizer --vocab-size 255 --mock-data --micro-batch-size 2 "
    "--global-batch-size 8 --lr 1e-3 --load somewhere"
)


def arguments(flags: str = "--train-iters 100") -> RunConfig:
    return read_args(f"{BASE} {flags}".split(), world_size=1, device="cpu", check_files=False)


def scheduler_of(run):
    return build_scheduler(Namespace(param_groups=[{"default_config": True}]), run.schedule, run.optimizer)


def found(begun: str, now: str) -> list[str]:
    saved = arguments(begun)
    state = scheduler_of(saved).state_dict()
    return list(differences(state, saved.flat(), arguments(now)))


FRACTION = "--lr-warmup-fraction 0.05"
WSD = "--train-iters 100 --lr-decay-style WSD --lr-wsd-decay-iters"


@pytest.mark.parametrize(
    ("begun", "now", "told"),
    [
        ("--train-iters 100", "--train-iters 100", []),
        ("--train-iters 100", "--train-iters 100 --global-batch-size 4", []),
        (f"--train-iters 100 {FRACTION}", f"--train-iters 100 --global-batch-size 6 {FRACTION}", []),
        ("--train-iters 100", "--train-samples 800 --global-batch-size 4", []),
        ("--train-iters 100", "--train-iters 200 --lr-decay-iters 100", []),
        ("--train-iters 100 --lr-decay-style constant", "--train-iters 200 --lr-decay-style constant", []),
        (
            f"--train-iters 400 {FRACTION}",
            f"--train-iters 404 {FRACTION}",
            [
                "--lr-warmup-iters (or --lr-warmup-fraction): 20 there, 20.2 here",
                "--lr-decay-iters (by default --train-iters): 400 there, 404 here",
            ],
        ),
        (f"{WSD} 10", f"{WSD} 20", ["--lr-wsd-decay-iters: 10 there, 20 here"]),
        (
            f"{WSD} 10",
            f"{WSD} 10 --lr-wsd-decay-style linear",
            ["--lr-wsd-decay-style: exponential there, linear here"],
        ),
        (
            "--train-samples 800",
            "--train-samples 900",
            ["--lr-decay-samples (by default --train-samples): 800 there, 900 here"],
        ),
        (
            "--train-iters 100 --lr-warmup-iters 9",
            "--train-iters 100 --lr-warmup-iters 9 --lr-warmup-init 1e-5",
            ["--lr-warmup-init: 0 there, 1e-05 here"],
        ),
    ],
)
def test_what_differs(begun, now, told):
    assert found(begun, now) == told


def test_a_checkpoint_of_earlier_megatron_with_a_state_alone():
    saved = scheduler_of(arguments()).state_dict()
    earlier = {"start_lr": saved["max_lr"], "end_iter": 800, "warmup_iter": 0, "num_iters": 80}
    assert list(differences(earlier, {}, arguments())) == []
    assert len(list(differences(earlier, {}, arguments("--train-iters 50")))) == 1


@pytest.mark.parametrize("batch", [4, 8, 16, 6])
def test_the_position_is_an_iteration(batch):
    saved = arguments()
    begun = scheduler_of(saved)
    begun.step(50 * 8)
    run = arguments(f"--train-iters 100 --global-batch-size {batch}")
    resumed = scheduler_of(run)
    resumed.restore(begun.state_dict(), saved.flat(), run)
    assert resumed.num_steps == 50 * batch
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(begun.optimizer.param_groups[0]["lr"])
    resumed.step(50 * batch)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_neither_flag_is_an_error_with_both_ways_out():
    saved = arguments()
    run = arguments("--train-iters 200")
    with pytest.raises(RunError, match="100 there, 200 here.*--override.*--use-checkpoint"):
        scheduler_of(run).restore(scheduler_of(saved).state_dict(), saved.flat(), run)


def test_the_checkpoints_schedule_is_taken_whole():
    saved = arguments(f"{WSD} 10 --lr-warmup-iters 5 --lr-warmup-init 1e-4")
    run = arguments(
        "--train-iters 200 --global-batch-size 4 --lr-decay-style WSD --lr-wsd-decay-iters 30 "
        "--lr-wsd-decay-style linear --use-checkpoint-opt_param-scheduler"
    )
    begun, resumed = scheduler_of(saved), scheduler_of(run)
    begun.step(0)
    resumed.restore(begun.state_dict(), saved.flat(), run)
    for _ in range(100):
        begun.step(8)
        resumed.step(4)
        theirs, ours = (part.optimizer.param_groups[0]["lr"] for part in (begun, resumed))
        assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(
    ("flags", "iterations"),
    [
        ("--train-iters 100", 0),
        ("--train-iters 100 --lr-decay-iters 60", 40),
        ("--train-iters 100 --lr-decay-iters 60 --min-lr 1e-5", 0),
        ("--train-iters 100 --lr-decay-iters 60 --lr-decay-style constant", 0),
        ("--train-samples 800 --lr-decay-samples 640", 20),
    ],
)
def test_iterations_without_a_rate(flags, iterations):
    run = arguments(flags)
    assert without_a_rate(scheduler_of(run), run) == iterations
