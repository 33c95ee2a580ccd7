"""torchrun --max-restarts: after a rank is killed all ranks restart, and the run resumes."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.functional.test_run import BASE
from tests.helpers.faults import newest_whole, steps_in
from tests.helpers.slurm import free_ports
from tests.helpers.training import flags

ITERATIONS = 60


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


@pytest.mark.slow
@pytest.mark.parametrize(("where", "rank"), [("static", 0), ("standalone", 1)])
def test_a_killed_rank(tmp_path, where, rank):
    save, metrics = tmp_path / "save", tmp_path / "metrics.jsonl"
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_ports(1)[0])]
    place = ["--standalone"] if where == "standalone" else address
    run = BASE | dict(train_iters=ITERATIONS, eval_iters=0, save=save, load=save, save_interval=5)
    command = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", str(REPOSITORY / "pretrain_pangu_pro.py")]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            [*command, *flags(**run, metrics_file=metrics)],
            stdout=log, stderr=log, cwd=REPOSITORY, env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
    while not (save / "iter_0000010").exists():
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    [victim] = [p for p in psutil.Process(launcher.pid).children() if rank_of(p) == str(rank)]
    victim.send_signal(signal.SIGKILL)
    assert launcher.wait(180) == 0, (tmp_path / "log").read_text()
    assert newest_whole(save) == ITERATIONS
    assert (tmp_path / "log").read_text().count(" set up in ") == 2
    iterations = [step["iteration"] for step in steps_in(metrics)]
    assert sorted(set(iterations)) == list(range(1, ITERATIONS + 1))
    assert len(iterations) < ITERATIONS + 10, "iterations of checkpoints that are there were run again"
