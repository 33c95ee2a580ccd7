"""File locks, which the operating system releases when the process ends, even if it is killed."""

import errno
import fcntl
import os
import sys
import time
from pathlib import Path

#: Errors of file systems without locks, or (ENOSPC) without space for one.
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSPC}


def open_locked(path: Path, wait: float = 0.0, inherited: bool = False) -> int:
    """Open ``path``, creating it if needed, and lock it until the returned descriptor is closed.

    On a file system without locks a warning is printed instead.

    Args:
        wait: seconds to wait for a lock that another process holds.
        inherited: use a BSD lock, which forked processes inherit and which also excludes a second lock of the
            same process, instead of a POSIX lock, which network file systems support.

    Raises:
        BlockingIOError: another process holds the lock; ``strerror`` is the content of the file.
        FileNotFoundError: the folder does not exist.
    """
    deadline = time.monotonic() + wait
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if try_lock(descriptor, inherited, path):
                # The previous holder may have removed the file meanwhile: then this lock is useless.
                if _is_at(descriptor, path):
                    return descriptor
            elif time.monotonic() > deadline:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                raise BlockingIOError(errno.EAGAIN, holder, str(path))
            else:
                time.sleep(0.05)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def try_lock(descriptor: int, inherited: bool = False, warn_of: Path | None = None) -> bool:
    """Try to take the lock; returns False if another process holds it.

    Returns True on a file system without locks, with a warning that names ``warn_of``.
    """
    try:
        (fcntl.flock if inherited else fcntl.lockf)(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            if warn_of is not None:
                note = f"WARNING: no lock on {warn_of.parent} ({error.strerror}): let nobody else write there"
                print(note, file=sys.stderr, flush=True)
        elif error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        else:
            raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a descriptor refers to the file at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
