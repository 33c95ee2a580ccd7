"""Worker processes that turn chunks into parts."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from megatron_ext.data.preprocess import encoding
from megatron_ext.data.preprocess.sources import Chunk
from megatron_ext.data.preprocess.worker import Part, Recipe, StoppedAtBadLine, process


class WorkerFailed(RuntimeError):
    """The run cannot go on, though nothing is wrong with the input; what is finished is kept."""


@dataclass
class Failure:
    """A chunk that stopped the run: at ``line``, from 1 within the chunk."""

    chunk: Chunk
    line: int
    reason: str


def run_chunks(
    chunks: Iterable[Chunk],
    workers: int,
    recipe: Recipe,
    tokenizer: Namespace,
    done: Callable[[Chunk, Part], None],
    lock: int,
) -> Failure | None:
    """Process every chunk, in this order, in ``workers`` processes; at most one is read ahead.

    Args:
        chunks: a generator that reads streams as it goes.
        done: called in this process for each finished part, in any order.
        lock: file descriptor that workers must not keep open.

    Returns:
        The first failure in the order of the chunks, with every chunk before it done; or None.

    Raises:
        WorkerFailed: a worker died, or met an error that is not the input's.
    """
    context = multiprocessing.get_context(
        "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    )
    team = [_Worker(context, recipe, tokenizer, lock) for _ in range(workers)]
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


def _collect(team: list["_Worker"], done: Callable, failures: list[Failure]) -> "_Worker":
    """Wait for a busy worker to finish its chunk."""
    busy = {worker.connection: worker for worker in team if worker.chunk}
    worker = busy[wait(list(busy))[0]]
    chunk, answer = worker.take()
    if isinstance(answer, Part):
        done(chunk, answer)
    else:
        failures.append(Failure(chunk, *answer))
    return worker


class _Worker:
    """The parent's side of one process; ``chunk`` is what it works on."""

    def __init__(self, context, recipe: Recipe, tokenizer: Namespace, lock: int) -> None:
        self.connection, theirs = context.Pipe()
        self.chunk: Chunk | None = None
        ends = (theirs, self.connection)
        self.process = context.Process(target=_work, args=(*ends, recipe, tokenizer, lock), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, chunk: Chunk) -> None:
        try:
            self.connection.send(chunk)
        except OSError:
            raise self._died() from None
        chunk.text = None  # the worker has it now
        self.chunk = chunk

    def take(self) -> tuple[Chunk, Part | tuple[int, str]]:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, str):
            raise WorkerFailed(f"a worker failed: {answer}")
        chunk, self.chunk = self.chunk, None
        return chunk, answer

    def _died(self) -> WorkerFailed:
        self.process.join(1)
        code = self.process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        hint = ", probably out of memory: use fewer --workers" if how == "SIGKILL" else ""
        return WorkerFailed(f"a worker died ({how}{hint}); run the same command again to go on")

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            if self.chunk is None:
                self.connection.send(None)  # closing is not enough: later workers hold copies of the pipe
            else:  # an error elsewhere: do not wait for it
                self.process.terminate()
        self.process.join()
        self.connection.close()


def _work(
    connection: Connection, parents_end: Connection, recipe: Recipe, tokenizer: Namespace, lock: int
) -> None:
    """A worker's life; ends when the parent says so, or is gone."""
    # A fork inherits the parent's end too: while a copy is open, the parent's death goes unnoticed.
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.close(lock)
    _, encode = encoding.load(tokenizer)
    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        if chunk is None:
            return
        try:
            answer = process(chunk, recipe, encode)
        except StoppedAtBadLine as stop:
            answer = (stop.line, stop.reason)
        except OSError as error:
            answer = f"{error.filename or recipe.folder}: {error.strerror or error}"
        except MemoryError:
            answer = f"{chunk.path}: out of memory; use fewer --workers"
        except Exception:
            answer = traceback.format_exc()
        try:
            connection.send(answer)
        except OSError:  # the parent is gone
            return
