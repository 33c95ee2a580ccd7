"""The folders of checkpoints: publishing, finding and removing one, each step atomic.

    SAVE/latest_checkpointed_iteration.txt      the tracker: the iteration to continue from
    SAVE/iter_0000100/                          a complete checkpoint
    SAVE/.incomplete_iter_0000200/              a checkpoint being written
    SAVE/.replaced_iter_0000100/                the previous one of an iteration, until the new is published
    SAVE/.removed_iter_0000050/                 a checkpoint being removed
    SAVE/.next_tracker                          the tracker of a checkpoint about to be published

All functions here run on one process (rank 0) and do not communicate. Only the process that holds the lock of
a run's folder (``lock.py``) may change it; readers change nothing.
"""

import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
_NEXT_TRACKER = ".next_tracker"
#: The tracker's content for converted weights, and the folder that holds them.
RELEASE = "release"
_WORKING, _REPLACED, _REMOVED = ".incomplete_", ".replaced_", ".removed_"
_NAME = re.compile(r"iter_([0-9]{7,18})")
#: Only of saves: an export next to the checkpoints has another name in its ``.incomplete_NAME``.
_LEFT_BY_A_SAVE = re.compile(r"(\.incomplete_|\.replaced_|\.removed_)(iter_[0-9]{7,18})")

logger = logging.getLogger(__name__)


def checkpoint_dir(base: str | os.PathLike[str], iteration: int) -> Path:
    """The folder of one checkpoint below the folder of a run, as Megatron-LM names it."""
    return Path(base) / f"iter_{iteration:07d}"


def working_dir(base: str | os.PathLike[str], iteration: int) -> Path:
    """The folder in which a checkpoint is written before it is published."""
    return Path(base) / f"{_WORKING}iter_{iteration:07d}"


def stored(base: str | os.PathLike[str]) -> dict[int, Path]:
    """Iteration -> folder of every checkpoint in ``base``, ascending.

    Includes a checkpoint that a killed save had moved aside in order to replace it.
    """
    folder, checkpoints = Path(base), {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        name = entry.name.removeprefix(_REPLACED)
        match = _NAME.fullmatch(name)
        if match and name == checkpoint_dir(base, int(match[1])).name and entry.is_dir():
            in_place = folder / name
            checkpoints[int(match[1])] = in_place if in_place.is_dir() else entry
    return dict(sorted(checkpoints.items()))


def list_iterations(base: str | os.PathLike[str]) -> list[int]:
    """The iterations of the checkpoints in ``base``, ascending."""
    return list(stored(base))


def tracked(base: str | os.PathLike[str]) -> int | str | None:
    """The content of the tracker: an iteration, ``RELEASE``, or other text; None without a tracker.

    A save that was killed between publishing its folder and moving the tracker left ``.next_tracker``
    behind; the folder is complete, so its iteration is returned.
    """
    base = Path(base)
    pending = _read(base / _NEXT_TRACKER)
    if isinstance(pending, int) and checkpoint_dir(base, pending).is_dir():
        return pending
    return _read(base / TRACKER)


def latest_iteration(base: str | os.PathLike[str]) -> int | None:
    """The iteration in the tracker; None if it has none, or there is no tracker."""
    named = tracked(base)
    return named if isinstance(named, int) else None


def _read(path: Path) -> int | str | None:
    try:
        text = path.read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror or str(error)
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else text


def prepare(base: str | os.PathLike[str], iteration: int) -> Path:
    """Clean up after interrupted saves, and create the empty working folder of a save."""
    base = Path(base)
    base.mkdir(parents=True, exist_ok=True)
    clean_up(base)
    folder = working_dir(base, iteration)
    folder.mkdir()
    return folder


def clean_up(base: str | os.PathLike[str]) -> None:
    """Complete or undo an interrupted save; called by the process that holds the folder's lock.

    Touches only the temporary files of saves: no published checkpoint and no other file.
    """
    base = Path(base)
    if not base.is_dir():
        return
    # First: otherwise it would mark a folder that is moved back below as the new one.
    pending = _read(base / _NEXT_TRACKER)
    if isinstance(pending, int) and checkpoint_dir(base, pending).is_dir():
        (base / _NEXT_TRACKER).replace(base / TRACKER)
    else:
        (base / _NEXT_TRACKER).unlink(missing_ok=True)
    for entry in list(base.iterdir()):
        left = _LEFT_BY_A_SAVE.fullmatch(entry.name)
        if left is None:
            continue
        target = base / left[2]
        if left[1] == _REPLACED and not os.path.lexists(target):
            entry.rename(target)
        else:
            _discard(entry)


def _discard(entry: Path) -> None:
    """Remove an entry, without following a link; logs a warning if that fails."""
    try:
        if entry.is_symlink():
            entry.unlink()
        else:
            shutil.rmtree(entry)
    except OSError as error:
        logger.warning("%s is of no use and could not be removed: %s", entry, error)


def publish(base: str | os.PathLike[str], iteration: int) -> Path:
    """Rename a completely written working folder to its final name, then update the tracker."""
    base = Path(base)
    target, working = checkpoint_dir(base, iteration), working_dir(base, iteration)
    fsync_dir(working)
    replaced = base / f"{_REPLACED}{target.name}"
    if os.path.lexists(target):
        target.rename(replaced)
    try:
        # Only now: next to a folder of its iteration it marks that folder as the new one.
        write_durably(base / _NEXT_TRACKER, str(iteration).encode())
        working.rename(target)
    except OSError:
        (base / _NEXT_TRACKER).unlink(missing_ok=True)
        if os.path.lexists(replaced):
            replaced.rename(target)
        raise
    fsync_dir(base)
    (base / _NEXT_TRACKER).replace(base / TRACKER)
    fsync_dir(base)
    if os.path.lexists(replaced):
        _discard(replaced)
    return target


@dataclass(frozen=True)
class Retain:
    """Which checkpoints of a run are kept when a newer one is published; the newest always is.

    ``interval`` is ``--save-retain-interval``: as upstream, the checkpoint before the newest is removed
    unless ``interval`` divides its iteration. ``latest`` keeps that many of the newest, and those
    whose iteration ``interval`` divides.
    """

    interval: int | None = None
    latest: int | None = None

    def superseded(self, before: Sequence[int], newest: int) -> list[int]:
        """The checkpoints to remove now, of ``before``: the run's checkpoints up to ``newest``, ascending."""
        before = [iteration for iteration in before if iteration < newest]
        if self.latest is not None:
            candidates = before[: len(before) + 1 - max(self.latest, 1)]
        elif self.interval is not None:
            candidates = before[-1:]
        else:
            return []
        return [i for i in candidates if not (self.interval and i % self.interval == 0)]


def remove(base: str | os.PathLike[str], iteration: int) -> None:
    """Remove a checkpoint; if interrupted, nothing is left that looks like one.

    A link to a checkpoint elsewhere was made by the user: the link and its target are kept.
    """
    folder = checkpoint_dir(base, iteration)
    if folder.is_symlink():
        return
    doomed = Path(base) / f"{_REMOVED}{folder.name}"
    folder.rename(doomed)
    _discard(doomed)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def fsync_dir(path: Path) -> None:
    """Wait until the entries of a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_visible(path: Path) -> None:
    """Raise if a folder that rank 0 created is not writable on this node."""
    if not os.access(path, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{path} was made by rank 0 but cannot be written here; --save must be a folder of all nodes"
        )
