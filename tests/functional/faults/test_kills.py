"""kill -9 at any moment loses nothing: the run resumes from the newest checkpoint with the same trace.

FAULT_KILLS sets the number of kills (``make faults`` takes 500), FAULT_SEED other moments.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.functional.test_run import BASE
from tests.helpers.faults import facts, fused_run, killed, newest_whole, random_fuse, steps_in
from tests.helpers.training import flags

KILLS = int(os.environ.get("FAULT_KILLS", 54))
SEED = os.environ.get("FAULT_SEED", "0")
RUN = BASE | dict(
    train_iters=10, save_interval=1, eval_iters=0, attention_dropout=0.1, hidden_dropout=0.1,
)  # fmt: skip
#: name -> processes, flags, share of the kills
JOBS = {
    "one": (1, dict(), 14),
    "distributed-optimizer": (2, dict(use_distributed_optimizer=True, keep_latest_k=2), 20),
    "async": (2, dict(async_save=True, tensor_model_parallel_size=2, keep_latest_k=1), 20),
}
SHARES = sum(share for _, _, share in JOBS.values())


def run_flags(folder, metrics, **changes) -> list[str]:
    return flags(**RUN | dict(save=folder, load=folder, metrics_file=metrics) | changes)


@pytest.mark.parametrize("job", JOBS)
def test_killed_again_and_again(pool, tmp_path, job, record_property):
    processes, changes, share = JOBS[job]
    wanted, rng = -(-KILLS * share // SHARES), random.Random(f"{SEED} {job}")
    pool.run(processes, fused_run, run_flags(tmp_path / "whole", tmp_path / "whole.jsonl", **changes), None)
    trace = {step["iteration"]: facts(step) for step in steps_in(tmp_path / "whole.jsonl")}
    assert sorted(trace) == list(range(1, RUN["train_iters"] + 1))

    kills = compared = attempt = 0
    while kills < wanted:
        attempt += 1
        folder, metrics = tmp_path / f"run{attempt}", tmp_path / f"run{attempt}.jsonl"
        newest, done = None, False
        while not done:
            fuse = random_fuse(rng, processes, folder, events=14, seconds=0.15) if kills < wanted else None
            argv = run_flags(folder, metrics, **changes)
            through: list[int] | None = None
            if fuse is None:
                pool.run(processes, fused_run, argv, None)
            else:
                through = killed(pool, processes, argv, fuse)
            done = through is None
            kills += not done
            before, newest = newest, newest_whole(folder)
            assert not through or newest == RUN["train_iters"]
            assert before is None or (newest is not None and newest >= before)
        assert newest == RUN["train_iters"]
        steps = steps_in(metrics)
        assert {step["iteration"] for step in steps} <= set(trace)
        for step in steps:
            assert facts(step) == trace[step["iteration"]]
        compared += len(steps)
        shutil.rmtree(folder)
    record_property("kills", kills)
    record_property("iterations compared", compared)
    print(f"{job}: {kills} kills in {attempt} runs, {compared} iterations equal to the uninterrupted ones")


def test_the_killed_launcher_leaves_no_orphans_and_a_checkpoint(tmp_path):
    """torchrun is killed: its processes detect it, save and end."""
    folder = tmp_path / "run"
    argv = run_flags(folder, tmp_path / "metrics.jsonl", train_iters=100_000, lr_decay_iters=100)
    argv[argv.index("--save-interval") + 1] = "100000"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "pretrain_pangu_pro.py",
    ]
    launcher = subprocess.Popen(
        [*command, *argv], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ranks: list[psutil.Process] = []
    try:
        _wait(lambda: len(steps_in(tmp_path / "metrics.jsonl")) > 3, launcher)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        assert len(ranks) >= 2
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert alive == []
        assert newest_whole(folder) > 3
    finally:
        for process in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.kill()
        launcher.wait()


def _wait(condition, launcher, seconds: float = 120) -> None:
    for _ in range(round(seconds / 0.2)):
        if condition():
            return
        assert launcher.poll() is None, "the launcher ended early"
        time.sleep(0.2)
    raise AssertionError("the run did not begin")
