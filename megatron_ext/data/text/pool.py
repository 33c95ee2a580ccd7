"""Worker processes that do something with every chunk, and end with the process that began them."""

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_ext.common.files import InputChanged
from megatron_ext.data.text.chunks import Chunk, place_name
from megatron_ext.data.text.documents import StoppedAtBadLine
from megatron_ext.data.text.unpack import SourceError

#: Tells of the first and the last line, from 1 within the chunk, that a worker is about to encode.
Note = Callable[[int, int], None]
#: (chunk, note) -> the answer, in a worker; raises StoppedAtBadLine for a line that must end the run.
Work = Callable[[Chunk, Note], Any]
#: A worker that is at the same lines for so long is reported.
SLOW_SECONDS = 600.0
PR_SET_PDEATHSIG = 1
#: Signals that a library's own mistakes end in.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}


class WorkerFailed(ChildProcessError):
    """The run cannot go on: a worker died, or met an error that is not of the kind that it knows."""


@dataclass
class Failure:
    """A chunk that stopped the run: at ``line``, from 1 within the chunk."""

    chunk: Chunk
    line: int
    reason: str
    remedy: str = ""


def run_chunks(
    chunks: Iterable[Chunk],
    workers: int,
    work: Work,
    done: Callable[[Chunk, Any], None],
    lock: int | None = None,
) -> Failure | None:
    """Do ``work`` for every chunk, in this order, in ``workers`` processes; at most one is read ahead.

    Args:
        chunks: a generator that reads streams as it goes.
        work: runs in a process forked from this one.
        done: called in this process with each chunk and its answer, in any order.
        lock: a file descriptor whose lock ends with this process, so that workers must not keep it open.

    Returns:
        The first failure in the order of the chunks, with every chunk before it done; or None.

    Raises:
        WorkerFailed: a worker died, or met an error that is not the input's; names the lines.
        InputChanged: an input is not as it was when the run began.
    """
    team = [_Worker(work, lock) for _ in range(workers)]
    failures: list[Failure] = []
    try:
        for chunk in chunks:
            if failures:
                break
            idle = next((worker for worker in team if worker.chunk is None), None) or _collect(
                team, done, failures
            )
            if failures:
                break
            idle.give(chunk)
        while any(worker.chunk for worker in team):
            _collect(team, done, failures)
    finally:
        for worker in team:
            worker.stop()
    return min(failures, key=lambda failure: failure.chunk.number, default=None)


def _collect(
    team: list["_Worker"], done: Callable[[Chunk, Any], object], failures: list[Failure]
) -> "_Worker":
    """Wait for a busy worker to finish its chunk."""
    busy = [worker for worker in team if worker.chunk]
    while not (ready := wait([worker.connection for worker in busy], SLOW_SECONDS / 10)):
        for worker in busy:
            worker.say_if_slow()
    worker = next(worker for worker in busy if worker.connection in ready)
    chunk, answer = worker.take()
    if isinstance(answer, StoppedAtBadLine):
        failures.append(Failure(chunk, answer.line, answer.reason, answer.remedy))
    else:
        done(chunk, answer)
    return worker


class _Failed:
    """What a worker answers when it cannot go on: the error that the parent shall raise."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Worker:
    """The parent's side of one process; ``chunk`` is what it works on."""

    def __init__(self, work: Work, lock: int | None) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.chunk: Chunk | None = None
        # First and last line that it is at, and since when (ns): written by the worker, read by the parent.
        self.at = memoryview(mmap.mmap(-1, 24)).cast("q")
        self.slow_since = 0
        ends = (theirs, self.connection)
        arguments = (*ends, os.getpid(), work, self.at, lock)
        self.process = context.Process(target=_live, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def give(self, chunk: Chunk) -> None:
        self.at[0], self.at[1], self.at[2] = 0, 0, time.monotonic_ns()
        try:
            self.connection.send(chunk)
        except OSError:
            raise self._died() from None
        chunk.text = None  # the worker has it now
        self.chunk = chunk

    def take(self) -> tuple[Chunk, Any]:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, _Failed):
            raise answer.error
        chunk, self.chunk = self.chunk, None
        assert chunk is not None
        return chunk, answer

    def _died(self) -> WorkerFailed:
        self.process.join(1)
        code = self.process.exitcode
        killed = signal.Signals(-code) if code is not None and code < 0 else None
        how = f"exit code {code}" if killed is None else killed.name
        if killed is None or killed in CRASHES:
            hint = "the tokenizer crashed on one of them: leave them out of the input"
        else:
            memory = "probably out of memory: use fewer --workers; " if killed is signal.SIGKILL else ""
            hint = f"{memory}run the same command again to go on"
        return WorkerFailed(f"{self._where()}a worker died ({how}); {hint}")

    def _where(self) -> str:
        if self.chunk is None:
            return ""
        path = self.chunk.path
        if self.at[0] == 0:  # it read, and had not come to encode
            return f"{path}: from {place_name(self.chunk, 1)} on: "
        return f"{path}: {place_name(self.chunk, self.at[0], self.at[1])}: "

    def say_if_slow(self) -> None:
        """Name the lines that it has been at for long, once: a tokenizer may never end on a text."""
        since = self.at[2]
        if since != self.slow_since and time.monotonic_ns() - since > SLOW_SECONDS * 1e9:
            self.slow_since = since
            where = f"{self._where()}a worker has been busy with them for {SLOW_SECONDS / 60:.0f} minutes"
            print(where, file=sys.stderr, flush=True)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            if self.chunk is None:
                self.connection.send(None)  # closing is not enough: later workers hold copies of the pipe
            else:  # an error elsewhere: do not wait for it
                self.process.kill()  # SIGTERM is lost on one that has not come to its own handlers yet
        self.process.join()
        self.connection.close()


def _live(
    connection: Connection,
    parents_end: Connection,
    parent: int,
    work: Work,
    at: memoryview,
    lock: int | None,
) -> None:
    """A worker's life; ends when the parent says so, or is gone."""
    # A fork inherits the parent's end too: while a copy is open, the parent's death goes unnoticed.
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if end_with_parent(parent) and lock is not None:
        os.close(lock)  # else the next run waits until this worker has ended as well

    def note(first: int, last: int) -> None:
        at[0], at[1], at[2] = first, last, time.monotonic_ns()

    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        if chunk is None:
            return
        try:
            connection.send(_answer(work, chunk, note))
        except OSError:  # the parent is gone
            return


def _answer(work: Work, chunk: Chunk, note: Note) -> Any:
    try:
        return work(chunk, note)
    except StoppedAtBadLine as error:
        return error
    except (InputChanged, SourceError) as error:
        return _Failed(error)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _Failed(WorkerFailed(f"{name}{error.strerror or error}"))
    except MemoryError:
        return _Failed(WorkerFailed(f"{chunk.path}: out of memory; use fewer --workers"))
    except Exception:
        return _Failed(WorkerFailed(f"{chunk.path}: a worker failed: {traceback.format_exc()}"))


def end_with_parent(parent: int) -> bool:
    """Let the kernel end this process together with ``parent``, stopped or not, before it does anything more.

    False where the system cannot do it; then the process ends when it looks for its next chunk.
    """
    if not sys.platform.startswith("linux"):
        return False
    # SIGTERM, which a stopped process keeps until it goes on, and then dies of at once.
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:  # it was gone before
        os._exit(1)
    return True
