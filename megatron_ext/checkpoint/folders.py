"""Where checkpoints lie, and how one appears, is found, and disappears: each step all or nothing.

    SAVE/latest_checkpointed_iteration.txt      the tracker: the iteration to continue from
    SAVE/iter_0000100/                          a complete checkpoint
    SAVE/.incomplete_iter_0000200/              one being written
    SAVE/.replaced_iter_0000100/                one of the same iteration, until the newer is in place
    SAVE/.removed_iter_0000050/                 one being removed
    SAVE/.next_tracker                          the tracker of a checkpoint about to be put in place

Everything here is done by one process (rank 0) and communicates nothing. What changes the folder of a
run is for the process that holds its lock (``lock.py``); readers change nothing.
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
#: What the tracker says of weights that were converted, and the folder that then holds them.
RELEASE = "release"
_WORKING, _REPLACED, _REMOVED = ".incomplete_", ".replaced_", ".removed_"
_NAME = re.compile(r"iter_([0-9]{7,18})")
#: Ours alone: an export beside the checkpoints has another name in its ``.incomplete_NAME``.
_LEFT_BY_A_SAVE = re.compile(r"(\.incomplete_|\.replaced_|\.removed_)(iter_[0-9]{7,18})")

logger = logging.getLogger(__name__)


def checkpoint_dir(base: str | os.PathLike[str], iteration: int) -> Path:
    """The folder of one checkpoint below the folder of a run, as Megatron-LM names it."""
    return Path(base) / f"iter_{iteration:07d}"


def working_dir(base: str | os.PathLike[str], iteration: int) -> Path:
    """The folder in which a checkpoint is written before it is put in place."""
    return Path(base) / f"{_WORKING}iter_{iteration:07d}"


def stored(base: str | os.PathLike[str]) -> dict[int, Path]:
    """Iteration -> folder of every checkpoint in ``base``, ascending.

    One that a killed save had moved aside, to put another of its iteration in its place, counts.
    """
    folder, found = Path(base), {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        name = entry.name.removeprefix(_REPLACED)
        match = _NAME.fullmatch(name)
        if match and name == checkpoint_dir(base, int(match[1])).name and entry.is_dir():
            in_place = folder / name
            found[int(match[1])] = in_place if in_place.is_dir() else entry
    return dict(sorted(found.items()))


def list_iterations(base: str | os.PathLike[str]) -> list[int]:
    """The iterations of which ``base`` holds a checkpoint, ascending."""
    return list(stored(base))


def tracked(base: str | os.PathLike[str]) -> int | str | None:
    """What the tracker names: an iteration; ``RELEASE``; other text if it names none; None if there is none.

    A save that was killed between putting its folder in place and moving the tracker left
    ``.next_tracker`` behind; the folder is complete then, so its iteration counts.
    """
    base = Path(base)
    pending = _read(base / _NEXT_TRACKER)
    if isinstance(pending, int) and checkpoint_dir(base, pending).is_dir():
        return pending
    return _read(base / TRACKER)


def latest_iteration(base: str | os.PathLike[str]) -> int | None:
    """The iteration that the tracker names; None if it names none, or there is no tracker."""
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
    """Make the empty working folder of a save, cleaning up after interrupted ones."""
    base = Path(base)
    base.mkdir(parents=True, exist_ok=True)
    clean_up(base)
    folder = working_dir(base, iteration)
    folder.mkdir()
    return folder


def clean_up(base: str | os.PathLike[str]) -> None:
    """Finish or undo what a killed save left half done; for the process that holds the folder's lock.

    Touches what saves make and nothing else: neither a checkpoint in place nor another's files.
    """
    base = Path(base)
    if not base.is_dir():
        return
    # First: of a folder that is moved back below it must not say that this is the new one.
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
    """Remove what is of no use any more, of a link the link alone; what cannot be removed is told."""
    try:
        if entry.is_symlink():
            entry.unlink()
        else:
            shutil.rmtree(entry)
    except OSError as error:
        logger.warning("%s is of no use and could not be removed: %s", entry, error)


def publish(base: str | os.PathLike[str], iteration: int) -> Path:
    """Put a completely written working folder in place, then move the tracker to it."""
    base = Path(base)
    target, working = checkpoint_dir(base, iteration), working_dir(base, iteration)
    fsync_dir(working)
    replaced = base / f"{_REPLACED}{target.name}"
    if os.path.lexists(target):
        target.rename(replaced)
    try:
        # Only now: beside a folder of its iteration it says that this is the new one.
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
    """Which checkpoints of a run stay when a newer one is in place; the newest always does.

    ``interval`` is ``--save-retain-interval``: as upstream, the checkpoint before the newest goes
    unless ``interval`` divides its iteration. ``latest`` keeps that many of the newest, and those
    that ``interval`` divides.
    """

    interval: int | None = None
    latest: int | None = None

    def superseded(self, before: Sequence[int], newest: int) -> list[int]:
        """Those of ``before``, the run's checkpoints up to ``newest``, ascending, to remove now."""
        before = [iteration for iteration in before if iteration < newest]
        if self.latest is not None:
            candidates = before[: len(before) + 1 - max(self.latest, 1)]
        elif self.interval is not None:
            candidates = before[-1:]
        else:
            return []
        return [i for i in candidates if not (self.interval and i % self.interval == 0)]


def remove(base: str | os.PathLike[str], iteration: int) -> None:
    """Remove a checkpoint; interrupted, it leaves nothing that looks like one.

    A link to a checkpoint that lies elsewhere was made by somebody else: it stays, as does what it
    leads to.
    """
    folder = checkpoint_dir(base, iteration)
    if folder.is_symlink():
        return
    doomed = Path(base) / f"{_REMOVED}{folder.name}"
    folder.rename(doomed)
    _discard(doomed)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def fsync_dir(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_visible(path: Path) -> None:
    """Raise if a folder that rank 0 made cannot be seen or written from here."""
    if not os.access(path, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{path} was made by rank 0 but cannot be written here; --save must be a folder of all nodes"
        )
