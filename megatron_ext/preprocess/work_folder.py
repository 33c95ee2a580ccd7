"""The folder in which finished parts wait for the end of a run: for one run at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.common.files import write_aside
from megatron_ext.common.lock import open_locked
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
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return open_locked(folder / LOCK, WAIT_SECONDS, inherited=True)
        except FileNotFoundError:  # its run came to its end and removed it at this moment
            continue
        except BlockingIOError:
            message = f"{folder}: another run is writing this output; wait for it, or stop it"
            raise OSError(message) from None


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
    write_aside(marker, plan.encode())


def _remove(folder: Path) -> None:
    """Remove the folder; its lock last, so that a run that waits for it finds nothing half removed."""
    for entry in folder.iterdir():
        if entry.name != LOCK:
            entry.unlink()
    (folder / LOCK).unlink()
    with contextlib.suppress(OSError):  # another run has made itself a lock there
        folder.rmdir()
