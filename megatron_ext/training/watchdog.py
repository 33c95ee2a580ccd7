"""Detects hangs, and ends all ranks with the reason when one of them fails.

A thread on each rank publishes in the job's key-value store what the rank is doing, and since when. A rank
that makes no progress is reported, with the stacks of all ranks, well before the timeout of a collective
ends the job. A rank that fails writes its reason to the store; a rank that is killed is detected by the peer
monitor. The other ranks then end with that reason, even if they wait in a collective or in the creation of a
process group that would block until its timeout.

torchrun does not replace this: its agents watch only whether the processes of their own host have exited.
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

from megatron_ext.common.errors import Interrupted, LostProcess, first_line
from megatron_ext.config.parallel import ProcessConfig
from megatron_ext.training.peer_monitor import PeerMonitor

#: After another rank's failure, a rank has this long to end by itself; less before its first step.
GRACE_SECONDS, SET_UP_GRACE_SECONDS = 10.0, 2.0
#: How long to wait for the reason after a lost connection. A failing rank publishes it before it ends.
REASON_SECONDS = 0.5
T = TypeVar("T")
#: Error texts of gloo, the key-value store and nccl for a lost peer. nccl's other errors, such as two ranks
#: on one GPU or a CUDA failure, are this rank's own.
_LOST_WORDS = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe"),
    *("Timed out waiting", "timed out", "Wait timeout", "wait timeout", "has gone or does not answer"),
    *("closed by remote peer", "remote process exited", "ncclRemoteError", "communicator was aborted"),
    *("collective operation timeout",),
)


@contextlib.contextmanager
def watching(process: ProcessConfig, store: Store) -> Iterator["Watchdog"]:
    """Run a watchdog inside the context, on every rank of the job that rendezvoused at ``store``.

    Raises LostProcess, with the rank and its reason where known, if another rank failed or was killed.
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
            dog.publish(f"rank {process.rank} failed: {type(error).__name__}: {error}")
            raise
        lost = f"another process of the job was killed or does not answer ({first_line(error)})"
        reason = dog.reason_elsewhere()
        dog.publish(f"rank {process.rank} lost its connection: {lost}")
        raise LostProcess(reason or lost) from error
    except Interrupted as error:
        dog.publish(f"rank {process.rank} {error}")
        raise
    finally:
        dog.stop()


def _lost_connection(error: BaseException) -> bool:
    """Whether a process group raises this error when another process is lost."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_WORDS)


@dataclass
class _Position:
    """What a rank is doing; ``number`` grows with each step of progress."""

    number: int = 0
    phase: str = "set-up"
    iteration: int = 0
    since: float = field(default_factory=time.monotonic)


class Watchdog:
    """The watchdog of one rank. Reports after ``patience`` seconds without progress; never if 0."""

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
        # A connection of its own, as the main thread may be blocked in the other one.
        self.store = PrefixStore("watchdog", store.clone() if hasattr(store, "clone") else store)
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self.leave = leave
        self.position = _Position()
        self.on_launcher_gone: Callable[[], None] = lambda: None
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._alarms_seen, self._reported = 0, -1
        self._peers: PeerMonitor | None = None
        self._reason, self._reason_at = "", 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread. Raises LostProcess or RuntimeError if rank 0 has already exited."""
        self._peers = PeerMonitor(self.store, self.rank, self.world_size)
        if self._peers.problem:
            self.say(
                f"rank {self.rank}: no line to rank 0 ({self._peers.problem}): a process that is killed may "
                "be missed only at --distributed-timeout-minutes"
            )
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._ended.set()
        if self._peers is not None:
            self._peers.wake()
            self._thread.join(5)
            self._peers.close()

    def note(self, phase: str, iteration: int | None = None) -> None:
        """Note that the rank has reached ``phase``; this counts as progress."""
        old = self.position
        self.position = _Position(old.number + 1, phase, old.iteration if iteration is None else iteration)

    def watch(self, iterator: Iterator[T] | None) -> Iterator[T] | None:
        """Wrap ``iterator`` so that the wait for each item is noted as a phase."""
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

    def publish(self, reason: str) -> None:
        """Write the reason why this rank ends to the store; the first reason of a job is kept."""
        with contextlib.suppress(RuntimeError):
            if not self.store.check(["failure"]):
                self.store.set("failure", reason)

    def reason_elsewhere(self) -> str | None:
        """The reason of another rank's failure, if one is published now or soon."""
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
            self._check_in()
        assert self._peers is not None  # set by start
        while not self._ended.is_set():
            for rank in self._peers.wait(0.5 if self._reason else interval):
                self._set_reason(f"rank {rank} was killed or does not answer")
                self.publish(self._reason)
            if self._ended.is_set():
                return
            self._check_launcher()
            with contextlib.suppress(RuntimeError):  # the store's process has exited
                self._check_in()
                if self.world_size > 1 and self.store.check(["failure"]):
                    self._set_reason(self.store.get("failure").decode())
            grace = GRACE_SECONDS if self.position.number else SET_UP_GRACE_SECONDS
            if self._reason and time.monotonic() - self._reason_at > grace:
                self.say(f"rank {self.rank} ends, because {self._reason}")
                sys.stdout.flush()
                sys.stderr.flush()
                self.leave(1)

    def _set_reason(self, reason: str) -> None:
        """Keep the first reason."""
        if not self._reason:
            self._reason, self._reason_at = reason, time.monotonic()

    def _check_launcher(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._launcher = None
            self.say(f"rank {self.rank}: the launcher has gone; saving and ending")
            self.on_launcher_gone()

    def _check_in(self) -> None:
        """Publish this rank's position, report if it is stuck, and show stacks if any rank is."""
        here = self.position
        stuck = self.patience and time.monotonic() - here.since > self.patience
        state = {"phase": here.phase, "iteration": here.iteration, "number": here.number}
        state |= {"waited": time.monotonic() - here.since, "time": time.time()}
        self.store.set(f"rank{self.rank}", json.dumps(state))
        if stuck and here.number != self._reported:
            self._reported = here.number
            self._report(here)
        alarms = self.store.add("alarms", 0)
        if alarms > self._alarms_seen:
            self._alarms_seen = alarms
            self.say(f"rank {self.rank}: stacks of all threads, because a rank makes no progress")
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _report(self, here: _Position) -> None:
        """Report this rank; the first rank to report lists all ranks and makes each show its stacks."""
        where = f"in {here.phase}, after iteration {here.iteration}"
        lines = [f"rank {self.rank} makes no progress: {time.monotonic() - here.since:.0f} s {where}"]
        # All ranks that wait for the culprit report within moments: one list is enough.
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
        missing = sorted(set(range(self.world_size)) - set(states))
        lines = [f"    rank {rank}: never gave a SIGN OF LIFE: look at this one first" for rank in missing]
        for rank, state in states.items():
            silent = time.time() - state["time"]
            text = f"in {state['phase']}, after iteration {state['iteration']}"
            text += f", for {state['waited'] + silent:.0f} s"
            if silent > max(15.0, self.patience):
                text += f"; NO SIGN OF LIFE for {silent:.0f} s: look at this one first"
            elif state["number"] == least and any(s["number"] > least for s in states.values()):
                text += "; got least far"
            lines.append(f"    rank {rank}: {text}")
        return lines
