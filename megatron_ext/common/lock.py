"""A lock on a file: the operating system gives it back when its process ends, however that ends."""

import errno
import fcntl
import os
import sys
import time
from pathlib import Path

#: What a file system says that keeps no locks, or (ENOSPC) has no room for one.
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSPC}


def open_locked(path: Path, wait: float = 0.0, inherited: bool = False) -> int:
    """A descriptor of ``path``, made where there is no such file, that holds its lock until it is closed.

    Where the file system keeps no locks it warns and goes on.

    Args:
        wait: seconds to wait for a lock that another process holds.
        inherited: processes that are forked hold it as well (BSD's kind, by which a process also keeps
            itself out), and not this process alone (POSIX's, which network file systems know).

    Raises:
        BlockingIOError: another process holds it; ``strerror`` is what it wrote into the file.
        FileNotFoundError: the folder is not there.
    """
    deadline = time.monotonic() + wait
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if try_lock(descriptor, inherited, path):
                # Who held it before may have removed it meanwhile: then this is a lock on nothing.
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
    """Whether the lock was free, and is held now; also on a file system that keeps no locks.

    ``warn_of`` is named in a warning then.
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
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
