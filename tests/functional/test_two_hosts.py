"""Two hosts, as network namespaces with a cable between them: same losses as one, and a cut cable.

Each host runs torchrun with two processes: tensor parallel within a host, data parallel across.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.arguments.parser import read_args
from megatron_ext.config import describe
from megatron_ext.planning import communication
from tests.conftest import REPOSITORY
from tests.functional.test_run import BASE
from tests.helpers.training import flags, losses, pretrain

ADDRESSES = ("10.253.7.1", "10.253.7.2")
LONG = BASE | dict(
    tensor_model_parallel_size=2, hidden_size=128, vocab_size=8191, eval_iters=0, train_iters=100_000,
    lr=1e-3, min_lr=1e-4,
)  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Two network namespaces joined by a pair of virtual interfaces."""

    def __init__(self) -> None:
        self.names = [f"pangu-{os.getpid()}-{i}" for i in (0, 1)]
        self.cables = [f"pg{os.getpid() % 10**7}-{i}" for i in (0, 1)]
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, second = self.cables
        ip(
            "link",
            "add",
            first,
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            second,
            "netns",
            self.names[1],
        )
        for name, cable, address in zip(self.names, self.cables, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")

    def cut(self) -> None:
        """Unplug the second host: the first keeps its address and routes, and receives nothing."""
        ip("-n", self.names[1], "link", "set", self.cables[1], "down")

    def sent(self) -> int:
        """Bytes that the first host has sent over the cable."""
        path = f"/sys/class/net/{self.cables[0]}/statistics/tx_bytes"
        command = ["ip", "netns", "exec", self.names[0], "cat", path]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def start(self, folder: Path, argv: list[str]) -> list[subprocess.Popen]:
        """torchrun on both hosts, which find each other at the first."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GLOO_")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        runs = []
        for number, (name, address) in enumerate(zip(self.names, ADDRESSES, strict=True)):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
            command += ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-id=hosts"]
            command += [f"--rdzv-endpoint={ADDRESSES[0]}:29400", f"--local-addr={address}"]
            # Both hosts have the same name, by which torchrun would look for the one to serve.
            command.append(f"--rdzv-conf=is_host={1 - number}")
            with open(folder / f"host{number}.log", "wb") as log:
                runs.append(
                    subprocess.Popen(
                        [*command, str(REPOSITORY / "pretrain_pangu_pro.py"), *map(str, argv)],
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        return runs

    def close(self) -> None:
        """Leave no process: a disconnected host waits for the others long after its launcher ended."""
        for name in self.names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in pids.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        hosts = Hosts()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
    yield hosts
    hosts.close()


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("host*.log")))


def end(runs: list[subprocess.Popen]) -> None:
    """End both launchers, which end their ranks."""
    for run in runs:
        run.terminate()
    for run in runs:
        try:
            run.wait(5)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_two_hosts_are_one_until_the_cable_is_cut(hosts, pool, tmp_path):
    """Losses equal those of one host bit for bit; the traffic is as predicted in docs/scaling.md."""
    metrics, checkpoints = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    argv = flags(
        **LONG, lr_decay_iters=100, metrics_file=metrics, save=checkpoints,
        load=checkpoints, save_interval=4, save_retain_interval=4, distributed_timeout_seconds_after_init=10,
    )  # fmt: skip
    runs = hosts.start(tmp_path, argv)
    try:
        seen = _train_until_two_checkpoints(hosts, runs, tmp_path, metrics, checkpoints)
        hosts.cut()
        started = time.monotonic()
        code = runs[0].wait(90)
        assert code == 1 and time.monotonic() - started < 60
    finally:
        end(runs)
    said = (tmp_path / "host0.log").read_text()
    assert "another process of the job was killed or does not answer" in said and "10000ms" in said

    twelve = dict(exit_interval=12, lr_decay_iters=100)  # of as many samples, whose order depends on it
    whole = pretrain(pool, 4, flags(**LONG | twelve))
    apart = losses(records(metrics))
    assert apart[:8] == losses(whole)[:8]
    _cable_carried_what_is_predicted(argv, seen)
    # One host goes on where the two stopped, from the last checkpoint both took part in.
    resumed = pretrain(pool, 4, flags(**LONG | twelve, load=checkpoints, ckpt_step=8))
    assert losses(resumed) == losses(whole)[8:]


def _train_until_two_checkpoints(hosts, runs, folder, metrics, checkpoints) -> dict[int, int]:
    """Number of finished iterations -> bytes the first host had sent by then."""
    seen: dict[int, int] = {}
    deadline = time.monotonic() + 400
    while not {4, 8} <= {int(path.name[5:]) for path in checkpoints.glob("iter_*")}:
        assert all(run.poll() is None for run in runs) and time.monotonic() < deadline, logs(folder)[-5000:]
        seen[len(records(metrics))] = hosts.sent()
        time.sleep(0.02)
    return seen


def _cable_carried_what_is_predicted(argv: list[str], seen: dict[int, int]) -> None:
    """Between two moments of training, both ranks of a host send their data parallel share each step."""
    run = read_args(argv, world_size=4, device="cpu", check_files=False)
    model = run.but(padded_vocab_size=8192).model
    step = 2 * communication.bytes_sent(model, describe.layout_of(run))["data"]
    first, last = min(count for count in seen if count), max(seen)
    assert last - first >= 3, seen
    # The counter is read between iterations or within one: one step of slack, and headers.
    assert (last - first - 1) * step < seen[last] - seen[first] < (last - first + 1) * step * 1.15
