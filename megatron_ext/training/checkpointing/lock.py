"""One run at a time saves into a folder: two would clean up, and replace, each other's checkpoints.

Rank 0 holds a lock of the operating system on ``SAVE/.lock`` as long as it lives: it ends with the
process however that ends, and a network file system passes it on to the other hosts. The file stays
behind and means nothing by itself.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.training.checkpointing.errors import CheckpointError, on_rank_0

LOCK = ".lock"
#: A job that is started again may meet the end of the one before.
WAIT_SECONDS = 10.0
#: What a file system says that keeps no locks, or (ENOSPC) has no room for the file.
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSPC}


@contextlib.contextmanager
def only_run_in(folder: str | os.PathLike | None, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Within it no other run saves into ``folder`` (none if there is no folder); collective.

    Raises:
        CheckpointError: on every rank, if another run does, still after ``wait`` seconds.
    """
    held: list[int] = []

    def acquire() -> None:
        held.append(_lock(Path(folder), wait))

    try:
        if folder is not None:
            on_rank_0(f"take --save {folder} for this run", acquire)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _lock(folder: Path, wait: float) -> int:
    """An open file that holds the lock: closing it, or the end of the process, gives it back."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _acquire(descriptor, folder, wait)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _acquire(descriptor: int, folder: Path, wait: float) -> None:
    deadline = time.monotonic() + wait
    while True:
        try:
            # POSIX's kind: a process that was forked does not hold it on when this one is killed.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                note = f"WARNING: no lock on --save {folder} ({error.strerror}): let no other run save there"
                print(note, file=sys.stderr, flush=True)
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() > deadline:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise CheckpointError(
                f"another run saves into it ({holder}); end that run, or give this one a folder of its own"
            )
        time.sleep(0.2)
    _sign(descriptor)


def _sign(descriptor: int) -> None:
    """Say in the file who holds the lock."""
    job = os.environ.get("SLURM_JOB_ID")
    words = f"host {socket.gethostname()}, process {os.getpid()}" + (f", SLURM job {job}" if job else "")
    with contextlib.suppress(OSError):  # a full disk keeps the lock, though not the words
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, words.encode() + b"\n", 0)
