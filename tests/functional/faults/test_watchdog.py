"""A hang is reported with its rank, phase and stacks; the failure of one rank ends all, with its reason."""

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from megatron_ext.training import batch, setup, watchdog
from tests.functional.test_run import BASE
from tests.helpers.faults import Fuse, fused_run, killed
from tests.helpers.pool import WorkerError
from tests.helpers.training import _pretrain, flags

ARGV = flags(**BASE | dict(train_iters=6, eval_iters=0, watchdog_minutes=0.03))


def hang(argv: list[str], rank: int, seconds: float, log: str) -> None:
    """One rank hangs for some seconds in the middle of its third step; standard error goes to a file."""
    count, original = 0, batch.next_batch

    def slow(iterator):
        nonlocal count
        count += 1
        if count == 5 and torch.distributed.get_rank() == rank:
            time.sleep(seconds)
        return original(iterator)

    with pytest.MonkeyPatch.context() as patch, open(f"{log}{torch.distributed.get_rank()}", "w") as file:
        patch.setattr(batch, "next_batch", slow)
        patch.setattr(sys, "stderr", file)
        _pretrain(argv)


def test_a_hang_is_reported_with_rank_phase_and_stacks(pool, tmp_path):
    pool.run(2, hang, ARGV, 1, 6.0, str(tmp_path / "log"))
    logs = [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    both = "".join(logs)
    assert "makes no progress: " in both and "after iteration 2" in both
    table = [line for line in both.splitlines() if line.startswith("    rank 1: in ")]
    [report] = [line for line in table if "after iteration 2" in line]
    assert "got least far" in report and "in a training step" in report
    assert all("stacks of all threads" in log and "train_step" in log for log in logs)
    assert "in slow" in logs[1] and "in slow" not in logs[0]  # where the culprit stands


def test_a_run_without_hangs_reports_none(pool, tmp_path):
    pool.run(2, hang, flags(**BASE | dict(eval_iters=0)), 1, 0.0, str(tmp_path / "log"))
    assert "progress" not in "".join((tmp_path / f"log{rank}").read_text() for rank in range(2))


def stop_and_report(argv: list[str], log: str) -> None:
    """Rank 1 is stopped by a signal, like a frozen machine; rank 0 must report the silent rank."""
    rank = torch.distributed.get_rank()
    pids = [None, None]
    torch.distributed.all_gather_object(pids, os.getpid())
    with pytest.MonkeyPatch.context() as patch, open(f"{log}{rank}", "w") as file:
        patch.setattr(sys, "stderr", file)
        if rank == 0:
            threading.Thread(target=wake_when_reported, args=(pids[1], f"{log}0"), daemon=True).start()
            os.environ["TORCH_GLOO_LAZY_INIT"] = "0"  # connects as rank 1 does
            _pretrain(argv)
        else:
            fused_run(argv, Fuse(1, "a training step", 7, signals=(signal.SIGSTOP,)), log)


def wake_when_reported(pid: int, log: str) -> None:
    for _ in range(100):
        time.sleep(1)
        if "makes no progress" in Path(log).read_text():
            break
    os.kill(pid, signal.SIGCONT)


@pytest.mark.skipif("FAULT_KILLS" not in os.environ, reason="waits 20 seconds: part of make faults")
def test_a_stopped_process_is_named(pool, tmp_path):
    argv = flags(**BASE | dict(train_iters=6, eval_iters=0, watchdog_minutes=0.3))
    pool.run(2, stop_and_report, argv, str(tmp_path / "log"), timeout=120)
    said = (tmp_path / "log0").read_text().splitlines()
    assert said[0].startswith("rank 0 makes no progress: ") and "after iteration 2" in said[0]
    [line] = [line for line in said if line.startswith("    rank 1: ")]  # where it was when it was heard last
    assert "NO SIGN OF LIFE" in line and "look at this one first" in line


def fail_on_one_rank(argv: list[str], where: str) -> None:
    """Only rank 1 fails: while it builds the tokenizer, or in the middle of its third step."""
    count, original = 0, batch.next_batch

    def broken(*args):
        nonlocal count
        count += 1
        if where == "step" and count < 5:
            return original(*args)
        raise OSError("disk on fire")

    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            place = (setup, "build_tokenizer") if where == "tokenizer" else (batch, "next_batch")
            patch.setattr(*place, broken)
        try:
            _pretrain(argv)
        except OSError:
            os._exit(3)  # as the program does: its connections close


@pytest.mark.parametrize("where", ["tokenizer", "step"])
def test_the_failure_of_one_rank_is_told_by_all(pool, where):
    with pytest.raises(WorkerError) as failed:
        pool.run(2, fail_on_one_rank, ARGV, where, grace=30)
    text = str(failed.value)
    expected = "disk on fire" if where == "tokenizer" else "rank 1 failed: OSError: disk on fire"
    assert "rank 0 of 2 failed: Traceback" in text and expected in text


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_is_killed_while_they_connect_is_missed_at_once(pool, tmp_path, rank):
    """The others wait for it in the creation of process groups, where no connection would be closed."""
    started = time.monotonic()
    argv = flags(**BASE | dict(global_batch_size=6))  # --distributed-timeout-minutes is 10
    # Not within the watchdog's first entry in the store: the pool's is a file, which that would tear.
    assert killed(pool, 3, argv, Fuse(rank, "set-up", 1, delay=0.2), ends_within=60) == []
    assert time.monotonic() - started < 60


def wait_for_the_reason(folder: str) -> None:
    """Rank 0 waits where no closed connection would wake it, as in a collective of nccl."""
    rank = torch.distributed.get_rank()
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    said = Path(folder, f"said{rank}")

    def leave(code: int) -> None:
        os._exit(40 + code)

    watchdog.SET_UP_GRACE_SECONDS = 0.2
    dog = watchdog.Watchdog(store, rank, 2, 0.4, say=said.write_text, leave=leave)
    dog.start()
    if rank == 1:
        dog.publish("rank 1 failed: for a reason")
        time.sleep(3)
        dog.stop()
    else:
        time.sleep(30)


def test_a_rank_that_waits_for_ever_ends_with_the_reason_of_another(pool):
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(WorkerError, match="rank 0 of 2 failed: the process died with exit code 41"):
            pool.run(2, wait_for_the_reason, folder, timeout=30)
        assert Path(folder, "said0").read_text() == "rank 0 ends, because rank 1 failed: for a reason"
