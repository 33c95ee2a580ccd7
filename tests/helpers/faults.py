"""Runs of the real program that end badly on purpose: killed or signalled at a chosen or random point."""

import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.checkpoint import checkpoint_dir, latest_iteration
from megatron_ext.checkpoint.integrity import damage
from megatron_ext.training import reporting
from megatron_ext.training.watchdog import Watchdog
from tests.helpers.pool import Pool, WorkerError
from tests.helpers.training import _pretrain

#: Changes of the disk that Python announces; the fuse counts those below the --save folder.
_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


@dataclass(frozen=True)
class Fuse:
    """When a signal hits a rank: ``delay`` seconds after the ``number``-th event.

    ``where`` is the --save folder, whose events are the changes of the disk in it (each is announced
    just before it happens), or words of a phase that the watchdog is told of; "set-up" is the one in
    which it begins, before the process groups are made. Nothing happens before the ranks have met: one
    that dies earlier is its launcher's to miss, and the pool is none.
    """

    rank: int
    where: str
    number: int
    delay: float = 0.0
    signals: tuple[int, ...] = (signal.SIGKILL,)
    apart: float = 0.0
    #: The phase in which the changes of the disk begin to count.
    begins: str = "set-up"

    def arm(self) -> None:
        """Arm it in this process."""
        seen = 0

        def event() -> None:
            nonlocal seen
            seen += 1
            if seen == self.number:
                burn() if self.delay == 0 and len(self.signals) == 1 else later.start()

        def burn() -> None:
            wait = self.delay
            for number in self.signals:
                time.sleep(wait)
                with _lock:  # not after the run, when the signal would hit an idle worker
                    if _armed[0]:
                        os.kill(os.getpid(), number)
                wait = self.apart

        later = threading.Thread(target=burn, daemon=True)

        def count_changes() -> None:
            _armed[0] = lambda name, args: event() if self._changes(name, args) else None

        _armed[0] = lambda name, args: None
        if os.path.isabs(self.where):
            if not _hooked:
                sys.addaudithook(lambda name, args: _armed[0] and _armed[0](name, args))
                _hooked.append(True)
            self._follow("start", self.begins, count_changes)
            self._follow("note", self.begins, count_changes)
        else:
            self._follow("note", self.where, event)
            self._follow("start", self.where, event)

    def _follow(self, method: str, phase: str, event: Callable[[], None]) -> None:
        """Trigger ``event`` after each call of a method of the watchdog in the phase."""
        original = getattr(Watchdog, method)

        def followed(dog: Watchdog, *args) -> None:
            original(dog, *args)
            if phase in dog.position.phase:
                event()

        setattr(Watchdog, method, followed)
        _restore.append(lambda: setattr(Watchdog, method, original))

    def _changes(self, name: str, args: tuple) -> bool:
        if name not in _EVENTS or not isinstance(args[0], str | Path):
            return False
        if name == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wa")):
            return False
        return Path(args[0]).is_relative_to(self.where)


_armed: list = [None]
_lock = threading.RLock()
_hooked: list = []
_restore: list = []


def fused_run(argv: list[str], fuse: Fuse | None, log: str | None = None) -> float:
    """Run the program with a fuse on one rank; returns the seconds. Errors go to ``log`` and the rank."""
    started = time.monotonic()
    # As in a real run: connected at the start, so that a rank that dies is missed at once.
    os.environ["TORCH_GLOO_LAZY_INIT"] = "0"
    reporting.peak_flops = lambda dtype: 1e12  # measuring it takes longer than the run
    rank = torch.distributed.get_rank()
    if fuse is not None and rank == fuse.rank:
        fuse.arm()
    try:
        with open(f"{log}{rank}" if log else os.devnull, "w") as file, contextlib.redirect_stderr(file):
            _pretrain(argv)
    finally:
        with _lock:
            _armed[0] = None
        while _restore:
            _restore.pop()()
    return time.monotonic() - started


def killed(pool: Pool, processes: int, argv: list, fuse: Fuse, ends_within: float = 60.0) -> list[int] | None:
    """Run until the fuse kills its rank; None if the run finished before.

    Every other rank has to end by itself, with the message that a process has gone: as an error, or,
    out of a call that waits for ever, from its watchdog. Returns the ranks that had done all that they
    had to do already.
    """
    try:
        with tempfile.TemporaryDirectory() as logs:
            try:
                pool.run(processes, fused_run, argv, fuse, f"{logs}/log", timeout=300, grace=ends_within)
            finally:
                said = {int(path.name[3:]): path.read_text() for path in Path(logs).iterdir()}
    except WorkerError as error:
        text = str(error)
        assert "did not end within" not in text, f"{text}\n{said}"
        ends = re.findall(r"rank (\d+) of \d+ failed: (.*?)(?=\n\nrank \d+ of|\Z)", text, re.DOTALL)
        failures = {int(rank): end for rank, end in ends}
        assert failures.pop(fuse.rank) == "the process died by SIGKILL", text
        for rank, end in failures.items():
            assert "was killed or does not answer" in end + said[rank], f"{end}\n{said[rank]}"
        return sorted(set(range(processes)) - {fuse.rank} - set(failures))
    return None


def newest_whole(folder: Path) -> int | None:
    """The iteration that a run would resume from; fails if that checkpoint is damaged."""
    newest = latest_iteration(folder)
    if newest is not None:
        assert damage(checkpoint_dir(folder, newest)) is None
    return newest


def steps_in(path: Path) -> list[dict]:
    """The iterations in a metrics file; a killed process may have left one incomplete line."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            assert not line.endswith("}"), line
    return [record for record in records if "split" not in record]


def facts(step: dict) -> tuple:
    """The values that must be equal bit for bit whenever an iteration is run."""
    return step["lm_loss"], step["grad_norm"], step["learning_rate"], step["consumed_samples"]


def random_fuse(rng: random.Random, processes: int, folder: Path, events: int, seconds: float) -> Fuse:
    """A kill of a random rank: at, or soon after, a random change of the disk in saving, or in set-up.

    ``events``: changes that rank 0 makes for one save; ``seconds`` that a save takes.
    """
    rank = rng.randrange(processes)
    if rng.random() < 0.2:
        return Fuse(rank, "set-up", 1, rng.uniform(0, 1))
    number = rng.randint(1, 2 * events if rank == 0 else 3)
    delay = rng.choice((0.0, rng.uniform(0, 2 * seconds)))
    return Fuse(rank, str(folder), number, delay)
