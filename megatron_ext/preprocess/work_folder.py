"""The folder in which finished parts wait for the end of a run: for one run at a time."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.common.progress import Progress
from megatron_ext.data.text.sources import SourceError
from megatron_ext.preprocess.options import PreprocessError

LOCK, PLAN = "lock", "plan"
#: A run that is started again may meet the end of the one before.
WAIT_SECONDS = 5.0


@contextlib.contextmanager
def work_folder(folder: Path, plan: str, progress: Progress) -> Iterator[int]:
    """The folder for this process alone, with a descriptor of its lock; parts of another plan are removed.

    Removed at the end, and after an error of the input; kept when the run is killed.

    Raises:
        OSError: another run is at work in it.
    """
    lock = _take(folder)
    try:
        _adopt(folder, plan, progress)
        try:
            yield lock
        except (PreprocessError, SourceError):
            _remove(folder)
            raise
        _remove(folder)
    finally:
        os.close(lock)


def _take(folder: Path) -> int:
    """A descriptor of the folder's lock, which is held until every copy of the descriptor is closed."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # its run came to its end and removed it at this moment
            continue
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino == os.stat(folder / LOCK).st_ino:
                return lock
        os.close(lock)
        if time.monotonic() > deadline:
            raise OSError(f"{folder}: another run is writing this output; wait for it, or stop it")
        time.sleep(0.05)


def _adopt(folder: Path, plan: str, progress: Progress) -> None:
    """Keep the parts of the same plan, remove others."""
    marker = folder / PLAN
    if marker.exists() and marker.read_text() == plan:
        progress.say(f"going on with what an earlier run left in {folder}")
        return
    stale = [entry for entry in folder.iterdir() if entry.name != LOCK]
    if stale:
        progress.say(f"{folder}: left by a run with other input or options; starting over")
    for entry in stale:
        entry.unlink()
    aside = folder / f"{PLAN}.aside"
    aside.write_text(plan)
    os.replace(aside, marker)


def _remove(folder: Path) -> None:
    """Remove the folder; its lock last, so that a run that waits for it finds nothing half removed."""
    for entry in folder.iterdir():
        if entry.name != LOCK:
            entry.unlink()
    (folder / LOCK).unlink()
    with contextlib.suppress(OSError):  # another run has made itself a lock there
        folder.rmdir()
