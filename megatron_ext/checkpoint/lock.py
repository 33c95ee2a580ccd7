"""One at a time writes in a place: two would clean up, and replace, each other's files.

Who writes holds a lock of the operating system on a file for as long as it lives: it ends with the
process however that ends, and a network file system passes it on to the other hosts. The file means
nothing by itself. Only under the lock is anything removed that an earlier writer left behind.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_ext.checkpoint import folders
from megatron_ext.checkpoint.errors import CheckpointError, on_rank_0
from megatron_ext.common.lock import open_locked

LOCK = ".lock"
#: A job that is started again may meet the end of the one before.
WAIT_SECONDS = 10.0
#: What this process holds: to open and close the file again would give the lock back (POSIX).
_held: set[str] = set()


@contextlib.contextmanager
def only_run_in(folder: str | os.PathLike[str] | None, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Within it no other run saves into ``folder`` (none if there is no folder); collective.

    What a save that was killed left there is finished or undone first.

    Raises:
        CheckpointError: on every rank, if another run does, still after ``wait`` seconds.
    """
    with contextlib.ExitStack() as held:

        def acquire(folder: Path) -> None:
            held.enter_context(saving_into(folder, wait))
            folders.clean_up(folder)

        if folder is not None:
            on_rank_0(f"take --save {folder} for this run", partial(acquire, Path(folder)))
        yield


@contextlib.contextmanager
def only_recording_in(losses: str | os.PathLike[str] | None) -> Iterator[None]:
    """Within it no other run records into the file ``losses`` (none if there is none); collective.

    Raises:
        CheckpointError: on every rank, if another run does.
    """
    with contextlib.ExitStack() as held:

        def acquire() -> None:
            path = Path(str(losses).removesuffix(".npy"))
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path.with_name(f".{path.name}.lock"), "another run records into it"))

        if losses is not None:
            on_rank_0(f"take --record-sample-loss {losses} for this run", acquire)
        yield


def saving_into(folder: Path, wait: float = WAIT_SECONDS) -> contextlib.AbstractContextManager[None]:
    """The lock on a folder of checkpoints, for one process; none to wait for where it is held already."""
    folder.mkdir(parents=True, exist_ok=True)
    return locked(folder / LOCK, "another run saves into it", wait, keep=True)


@contextlib.contextmanager
def locked(path: Path, busy: str, wait: float = 0.0, keep: bool = False) -> Iterator[None]:
    """Hold the lock on the file ``path``, which is removed in the end unless ``keep``; communicates nothing.

    Raises:
        CheckpointError: another process holds it, still after ``wait`` seconds: ``busy``, and who it is.
    """
    name = os.path.realpath(path)
    if name in _held:
        yield
        return
    descriptor = _open_locked(path, busy, wait)
    _held.add(name)
    try:
        yield
    finally:
        _held.discard(name)
        if not keep:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(path: Path, busy: str, wait: float) -> int:
    """The open file that holds the lock: closing it, or the end of the process, gives it back."""
    try:
        descriptor = open_locked(path, wait)
    except BlockingIOError as error:
        holder = error.strerror or "another process"
        message = f"{busy} ({holder}); end that run, or give this one a place of its own"
        raise CheckpointError(message) from None
    _sign(descriptor)
    return descriptor


def _sign(descriptor: int) -> None:
    """Say in the file who holds the lock."""
    job = os.environ.get("SLURM_JOB_ID")
    words = f"host {socket.gethostname()}, process {os.getpid()}" + (f", SLURM job {job}" if job else "")
    with contextlib.suppress(OSError):  # a full disk keeps the lock, though not the words
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, words.encode() + b"\n", 0)
