"""Ctrl-C: the first one saves and stops orderly, the second ends at once; one line, no stacks."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.common.errors import Interrupted
from tests.conftest import REPOSITORY
from tests.functional.test_run import BASE
from tests.helpers.faults import Fuse, fused_run, newest_whole
from tests.helpers.pool import WorkerError
from tests.helpers.slurm import free_ports
from tests.helpers.training import flags
from tests.unit.data import corpora

LONG = BASE | dict(train_iters=100_000, log_interval=1, eval_iters=0, num_workers=1)
PROGRAM = str(REPOSITORY / "pretrain_pangu_pro.py")
#: Runs the program, and sends it a signal when it begins to import torch.
AT_AN_IMPORT = """
import os, runpy, signal, sys
program, number, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[1:2] + sys.argv[3:]
sent = []
def look(event, args):
    if event == "import" and args[0] == "torch" and not sent:
        sent.append(os.kill(os.getpid(), number))
sys.addaudithook(look)
runpy.run_path(program, run_name="__main__")
"""


started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_run_outlives_its_test():
    yield
    for run in started:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    started.clear()


def start(command: list, folder: Path, **environment: str) -> subprocess.Popen:
    """A process at the head of its own group, as a shell starts one at a terminal."""
    settings = os.environ | {"PYTHONWARNINGS": "ignore"} | environment
    with open(folder / "log", "wb") as log:
        run = subprocess.Popen(
            list(map(str, command)),
            stdout=log,
            stderr=log,
            cwd=REPOSITORY,
            env=settings,
            start_new_session=True,
        )
    started.append(run)
    return run


def until(run: subprocess.Popen, folder: Path, words: str) -> None:
    while words not in (folder / "log").read_text():
        assert run.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_while_it_imports(tmp_path, number):
    run = start([sys.executable, "-c", AT_AN_IMPORT, PROGRAM, number.value, *flags(**LONG)], tmp_path)
    assert run.wait(60) == 128 + number
    line = (
        f"pretrain_pangu_pro.py: error: received {number.name} during set-up: there is nothing to save yet\n"
    )
    assert (tmp_path / "log").read_text() == line


def test_ahead_of_a_time_limit_there_is_time_for_an_iteration(tmp_path):
    folder = tmp_path / "save"
    argv = flags(**LONG | dict(save=folder, save_interval=100_000))
    run = start([sys.executable, "-c", AT_AN_IMPORT, PROGRAM, signal.SIGUSR1.value, *argv], tmp_path)
    assert run.wait(120) == 0
    assert newest_whole(folder) == 1


def test_while_it_waits_for_the_others(tmp_path):
    """The other rank never arrives; Python cannot interrupt this wait."""
    [port] = free_ports(1)
    place = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run = start([sys.executable, PROGRAM, *flags(**LONG)], tmp_path, **place)
    while run.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == 130
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if "socket.cpp" not in line]
    assert len(lines) == 1 and lines[0].endswith(
        "received SIGINT during set-up: there is nothing to save yet"
    )


def test_in_the_building_of_dataset_indices(pool, tmp_path):
    """Every rank ends with the reason, and no unfinished folder stays in the cache."""
    cache, corpus = tmp_path / "cache", corpora.make_dataset(tmp_path / "a", [5, 90, 33, 1, 60] * 20)
    argv = flags(**BASE | dict(mock_data=None, data_path=corpus, split="90,10,0", data_cache_path=cache))
    with pytest.raises(WorkerError) as failed:
        pool.run(2, fused_run, argv, Fuse(0, str(cache), 3, signals=(signal.SIGINT,)), grace=30)
    text = str(failed.value)
    assert f"{Interrupted.__name__}: received SIGINT during set-up" in text
    assert "rank 1 of 2 failed" in text and "rank 0 received SIGINT during set-up" in text
    assert cache.is_dir() and not list(cache.glob(".building-*"))


@pytest.mark.parametrize("where", ["a training step", "waiting for data", "evaluating", "saving"])
def test_in_the_run(pool, tmp_path, where):
    folder = tmp_path / "run"
    argv = flags(**BASE | dict(train_iters=8, eval_iters=2, eval_interval=2, save_interval=3, save=folder))
    pool.run(2, fused_run, argv, Fuse(1, where, 2, signals=(signal.SIGINT,)))
    assert newest_whole(folder) in (1, 2, 3)


def test_at_a_terminal(tmp_path):
    """The whole group gets it, data workers included."""
    run = start([sys.executable, PROGRAM, *flags(**LONG | dict(num_workers=2))], tmp_path)
    until(run, tmp_path, "iteration        3/")
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(60) == 0
    *_, told, end = (tmp_path / "log").read_text().splitlines()
    assert (
        told == "received SIGINT: stopping in order; a second one ends the run at once"
        or " iteration " in told
    )
    assert "received SIGINT; nothing was saved, as there is no --save" in end
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_frozen_recording(pool, tmp_path):
    """It stops, and resumes where it was."""
    trained = dict(save=tmp_path / "model", save_interval=6)
    pool.run(1, fused_run, flags(**BASE | trained | dict(eval_iters=0)), None)
    losses = tmp_path / "losses.npy"
    argv = flags(
        **BASE | dict(train_iters=200, load=tmp_path / "model", record_sample_loss=losses, eval_iters=0)
    )
    pool.run(1, fused_run, argv, Fuse(0, "recording", 2, signals=(signal.SIGINT,)))
    recorded = losses.with_suffix(".json").read_text()
    assert '"recorded": 1600' not in recorded
    pool.run(1, fused_run, argv, None)
    assert '"recorded": 1600' in losses.with_suffix(".json").read_text()


def test_under_torchrun(tmp_path):
    """It passes the signal on to each rank, which has a group of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    folder = tmp_path / "save"
    argv = flags(**LONG | dict(save=folder, save_interval=100_000))
    run = start([*launcher, PROGRAM, *argv], tmp_path)
    until(run, tmp_path, "iteration        3/")
    os.killpg(run.pid, signal.SIGINT)
    run.wait(60)
    assert newest_whole(folder) >= 3
