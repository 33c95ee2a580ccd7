"""Only one run writes into a folder at a time: two would clean up, and replace, each other's files.

The writer holds an operating system lock on a file as long as it runs: the lock ends with the process, even
if it is killed, and network file systems enforce it on all hosts. The existence of the file means nothing.
What an earlier writer left behind is removed only under the lock.
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
#: A restarted job may overlap with the end of the previous one.
WAIT_SECONDS = 10.0
#: Locks held by this process: opening and closing the file again would release them (POSIX).
_held: set[str] = set()


@contextlib.contextmanager
def only_run_in(folder: str | os.PathLike[str] | None, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Lock ``folder`` against other runs that save there (no lock if None); collective.

    What a killed save left in the folder is completed or undone first.

    Raises:
        CheckpointError: on every rank, if another run still holds the lock after ``wait`` seconds.
    """
    with contextlib.ExitStack() as held:

        def acquire(folder: Path) -> None:
            held.enter_context(saving_into(folder, wait))
            folders.clean_up(folder)

        if folder is not None:
            on_rank_0(f"take --save {folder} for this run", partial(acquire, Path(folder)))
        yield


@contextlib.contextmanager
def only_recording_in(
    record: str | os.PathLike[str] | None, flag: str = "--record-sample-loss"
) -> Iterator[None]:
    """Lock the file ``record`` against other runs that record into it (no lock if None); collective.

    Raises:
        CheckpointError: on every rank, if another run holds the lock.
    """
    with contextlib.ExitStack() as held:

        def acquire() -> None:
            path = Path(str(record).removesuffix(".npy"))
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path.with_name(f".{path.name}.lock"), "another run records into it"))

        if record is not None:
            on_rank_0(f"take {flag} {record} for this run", acquire)
        yield


def saving_into(folder: Path, wait: float = WAIT_SECONDS) -> contextlib.AbstractContextManager[None]:
    """The lock on a folder of checkpoints, for one process; does nothing if the process holds it already."""
    folder.mkdir(parents=True, exist_ok=True)
    return locked(folder / LOCK, "another run saves into it", wait, keep=True)


@contextlib.contextmanager
def locked(path: Path, busy: str, wait: float = 0.0, keep: bool = False) -> Iterator[None]:
    """Lock the file ``path``, and remove it at the end unless ``keep``; does not communicate.

    Raises:
        CheckpointError: another process still holds it after ``wait`` seconds; the message is ``busy`` and
            the holder.
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
    """The descriptor that holds the lock, until it is closed or the process ends."""
    try:
        descriptor = open_locked(path, wait)
    except BlockingIOError as error:
        holder = error.strerror or "another process"
        message = f"{busy} ({holder}); end that run, or give this one a place of its own"
        raise CheckpointError(message) from None
    _sign(descriptor)
    return descriptor


def _sign(descriptor: int) -> None:
    """Write the holder into the file."""
    job = os.environ.get("SLURM_JOB_ID")
    words = f"host {socket.gethostname()}, process {os.getpid()}" + (f", SLURM job {job}" if job else "")
    with contextlib.suppress(OSError):  # on a full disk the lock still works
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, words.encode() + b"\n", 0)
