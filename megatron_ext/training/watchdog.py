"""Finds hangs, and makes the failure of one rank known to all.

Each rank has a thread that tells the others, through the job's key-value store, what the rank does
and since when. Ranks that make no progress are reported, with the stacks of all, well before the
timeout of a collective ends the job. A rank that fails leaves its reason in the store, and one that
is killed is missed on its lifeline: the others end with the reason, even out of a collective, or of
the making of a process group, that would wait for the timeout.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch.distributed import PrefixStore, Store

from megatron_ext.common.errors import Interrupted, LostProcess
from megatron_ext.config.parallel import ProcessConfig
from megatron_ext.training.peer_monitor import PeerMonitor

#: A rank that was told of another's failure gets this long to end by itself; less before its first step.
GRACE_SECONDS, SET_UP_GRACE_SECONDS = 10.0, 2.0
#: After a lost connection: how long to wait for the reason. A rank that fails tells it before it ends.
REASON_SECONDS = 0.5
#: What gloo, the key-value store and nccl say of a peer that has gone. Of nccl's errors no others: that two
#: ranks have one GPU, or that CUDA has failed, is this rank's own trouble.
T = TypeVar("T")
_LOST_WORDS = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe"),
    *("Timed out waiting", "timed out", "Wait timeout", "wait timeout", "has gone or does not answer"),
    *("closed by remote peer", "remote process exited", "ncclRemoteError", "communicator was aborted"),
    *("collective operation timeout",),
)


@contextlib.contextmanager
def watching(process: ProcessConfig, store: Store) -> Iterator["Watchdog"]:
    """A watchdog over what runs within, on every rank of a job that met at ``store``.

    Raises LostProcess, naming the rank and its reason where known, if another rank failed or went.
    """
    patience = process.watchdog_minutes
    if patience is None:
        patience = process.distributed_timeout_minutes / 2
    dog = Watchdog(store, process.rank, process.world_size, patience * 60)
    try:
        dog.start()
        yield dog
    except Exception as error:
        if not _lost_connection(error):
            dog.tell(f"rank {process.rank} failed: {type(error).__name__}: {error}")
            raise
        first_line = str(error).strip().split("\n")[0]
        lost = f"another process of the job was killed or does not answer ({first_line})"
        reason = dog.reason_elsewhere()
        dog.tell(f"rank {process.rank} lost its connection: {lost}")
        raise LostProcess(reason or lost) from error
    except Interrupted as error:
        dog.tell(f"rank {process.rank} {error}")
        raise
    finally:
        dog.stop()


def _lost_connection(error: BaseException) -> bool:
    """Whether this is how a process group reports that another process has gone."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_WORDS)


@dataclass
class _Position:
    """What a rank does: ``number`` grows with every sign of progress."""

    number: int = 0
    phase: str = "set-up"
    iteration: int = 0
    since: float = field(default_factory=time.monotonic)


class Watchdog:
    """The thread of one rank. ``patience`` in seconds without progress until a report; 0 reports none."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        patience: float,
        say: Callable[[str], None] | None = None,
        leave: Callable[[int], None] = os._exit,
    ):
        self.rank, self.world_size, self.patience = rank, world_size, patience
        # A connection of its own: the main thread may wait in the other one.
        self.store = PrefixStore("watchdog", store.clone() if hasattr(store, "clone") else store)
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self.leave = leave
        self.position = _Position()
        self.on_launcher_gone: Callable[[], None] = lambda: None
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._alarms_answered, self._reported = 0, -1
        self._lines: PeerMonitor | None = None
        self._reason, self._told_at = "", 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch. Raises LostProcess or RuntimeError if rank 0 has gone before."""
        self._lines = PeerMonitor(self.store, self.rank, self.world_size)
        if self._lines.problem:
            self.say(
                f"rank {self.rank}: no line to rank 0 ({self._lines.problem}): a process that is killed may "
                "be missed only at --distributed-timeout-minutes"
            )
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._lines is not None:
            self._lines.wake()
            self._thread.join(5)
            self._lines.close()

    def note(self, phase: str, iteration: int | None = None) -> None:
        """The rank has come to ``phase``: a sign of progress."""
        old = self.position
        self.position = _Position(old.number + 1, phase, old.iteration if iteration is None else iteration)

    def watch(self, iterator: Iterator[T] | None) -> Iterator[T] | None:
        """``iterator``, with the wait for each of its items noted as a phase."""
        return None if iterator is None else self._noted(iterator)

    def _noted(self, iterator: Iterator[T]) -> Iterator[T]:
        while True:
            phase = self.position.phase
            self.note("waiting for data")
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.note(phase)
            yield item

    def tell(self, reason: str) -> None:
        """Leave the reason why this rank ends where the others find it; the first of a job counts."""
        with contextlib.suppress(RuntimeError):
            if not self.store.check(["failure"]):
                self.store.set("failure", reason)

    def reason_elsewhere(self) -> str | None:
        """Why another rank failed, if it has said so, or says so soon."""
        deadline = time.monotonic() + REASON_SECONDS
        with contextlib.suppress(RuntimeError):
            while True:
                if self._reason or self.store.check(["failure"]):
                    return self._reason or self.store.get("failure").decode()
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
        return None

    def _run(self) -> None:
        interval = min(5.0, self.patience / 4) if self.patience else 5.0
        with contextlib.suppress(RuntimeError):
            self._look()
        assert self._lines is not None  # start made them
        while not self._ended.is_set():
            for rank in self._lines.wait(0.5 if self._reason else interval):
                self._heard(f"rank {rank} was killed or does not answer")
                self.tell(self._reason)
            if self._ended.is_set():
                return
            self._look_for_the_launcher()
            with contextlib.suppress(RuntimeError):  # the store has gone with its process
                self._look()
                if self.world_size > 1 and self.store.check(["failure"]):
                    self._heard(self.store.get("failure").decode())
            grace = GRACE_SECONDS if self.position.number else SET_UP_GRACE_SECONDS
            if self._reason and time.monotonic() - self._told_at > grace:
                self.say(f"rank {self.rank} ends, because {self._reason}")
                sys.stdout.flush()
                sys.stderr.flush()
                self.leave(1)

    def _heard(self, reason: str) -> None:
        """Another rank has failed; the first reason counts."""
        if not self._reason:
            self._reason, self._told_at = reason, time.monotonic()

    def _look_for_the_launcher(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._launcher = None
            self.say(f"rank {self.rank}: the launcher has gone; saving and ending")
            self.on_launcher_gone()

    def _look(self) -> None:
        here = self.position
        stuck = self.patience and time.monotonic() - here.since > self.patience
        state = {"phase": here.phase, "iteration": here.iteration, "number": here.number}
        state |= {"waited": time.monotonic() - here.since, "time": time.time()}
        self.store.set(f"rank{self.rank}", json.dumps(state))
        if stuck and here.number != self._reported:
            self._reported = here.number
            self._report(here)
        alarms = self.store.add("alarms", 0)
        if alarms > self._alarms_answered:
            self._alarms_answered = alarms
            self.say(f"rank {self.rank}: stacks of all threads, because a rank makes no progress")
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _report(self, here: _Position) -> None:
        """One rank tells of all; every rank then shows its stacks."""
        where = f"in {here.phase}, after iteration {here.iteration}"
        lines = [f"rank {self.rank} makes no progress: {time.monotonic() - here.since:.0f} s {where}"]
        # Those that wait for the culprit are all reported within moments: the first tells of all.
        if self.store.add(f"report{here.iteration}", 1) == 1:
            lines += self._table()
            self.store.add("alarms", 1)
        self.say("\n".join(lines))

    def _table(self) -> list[str]:
        states = {}
        for rank in range(self.world_size):
            if self.store.check([f"rank{rank}"]):
                states[rank] = json.loads(self.store.get(f"rank{rank}"))
        least = min(state["number"] for state in states.values())
        unheard = sorted(set(range(self.world_size)) - set(states))
        lines = [f"    rank {rank}: never gave a SIGN OF LIFE: look at this one first" for rank in unheard]
        for rank, state in states.items():
            silent = time.time() - state["time"]
            told = f"in {state['phase']}, after iteration {state['iteration']}"
            told += f", for {state['waited'] + silent:.0f} s"
            if silent > max(15.0, self.patience):
                told += f"; NO SIGN OF LIFE for {silent:.0f} s: look at this one first"
            elif state["number"] == least and any(s["number"] > least for s in states.values()):
                told += "; got least far"
            lines.append(f"    rank {rank}: {told}")
        return lines
