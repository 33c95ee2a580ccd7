"""Where checkpoints lie, and how one appears, is found, and disappears: each step all or nothing.

    SAVE/latest_checkpointed_iteration.txt      the tracker: the iteration to continue from
    SAVE/iter_0000100/                          a complete checkpoint
    SAVE/.incomplete_iter_0000200/              one being written
    SAVE/.replaced_iter_0000100/                one of the same iteration, until the newer is in place
    SAVE/.removed_iter_0000050/                 one being removed
    SAVE/.next_tracker                          the tracker of a checkpoint about to be put in place

Everything here is done by one process (rank 0) and communicates nothing.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.training.checkpointing.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
_NEXT_TRACKER = ".next_tracker"
_WORKING, _REPLACED, _REMOVED = ".incomplete_", ".replaced_", ".removed_"
_NAME = re.compile(r"iter_(\d{7,})")


def checkpoint_dir(base: str | os.PathLike, iteration: int) -> Path:
    """The folder of one checkpoint below the folder of a run, as Megatron-LM names it."""
    return Path(base) / f"iter_{iteration:07d}"


def working_dir(base: str | os.PathLike, iteration: int) -> Path:
    """The folder in which a checkpoint is written before it is put in place."""
    return Path(base) / f"{_WORKING}iter_{iteration:07d}"


def list_iterations(base: str | os.PathLike) -> list[int]:
    """The iterations of which ``base`` holds a folder in place, ascending."""
    folder = Path(base)
    if not folder.is_dir():
        return []
    names = (_NAME.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(name[1]) for name in names if name)


def latest_iteration(base: str | os.PathLike) -> int | None:
    """The iteration that the tracker names; None if there is no tracker or it cannot be read.

    A save that was killed between putting its folder in place and moving the tracker left
    ``.next_tracker`` behind; the folder is complete then, so its iteration counts.
    """
    base = Path(base)
    pending = _read_number(base / _NEXT_TRACKER)
    if pending is not None and checkpoint_dir(base, pending).is_dir():
        return pending
    return _read_number(base / TRACKER)


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if text == "release":  # upstream's name for converted weights
        return None
    return int(text) if re.fullmatch(r"\d+", text) else None


def prepare(base: str | os.PathLike, iteration: int) -> Path:
    """Make the empty working folder of a save, cleaning up after interrupted ones."""
    base = Path(base)
    base.mkdir(parents=True, exist_ok=True)
    clean_up(base)
    folder = working_dir(base, iteration)
    folder.mkdir()
    return folder


def clean_up(base: str | os.PathLike) -> None:
    """Finish or undo what a killed process left half done; never touches a checkpoint in place."""
    base = Path(base)
    if not base.is_dir():
        return
    for entry in list(base.iterdir()):
        if entry.name.startswith(_REPLACED):
            target = base / entry.name.removeprefix(_REPLACED)
            if not target.exists():
                entry.rename(target)
                continue
        if entry.name.startswith((_WORKING, _REPLACED, _REMOVED)):
            shutil.rmtree(entry)
    pending = _read_number(base / _NEXT_TRACKER)
    if pending is not None and checkpoint_dir(base, pending).is_dir():
        (base / _NEXT_TRACKER).replace(base / TRACKER)
    else:
        (base / _NEXT_TRACKER).unlink(missing_ok=True)


def publish(base: str | os.PathLike, iteration: int) -> Path:
    """Put a completely written working folder in place, then move the tracker to it."""
    base = Path(base)
    target, working = checkpoint_dir(base, iteration), working_dir(base, iteration)
    fsync_dir(working)
    write_durably(base / _NEXT_TRACKER, str(iteration).encode())
    replaced = base / f"{_REPLACED}{target.name}"
    if target.exists():
        target.rename(replaced)
    working.rename(target)
    fsync_dir(base)
    (base / _NEXT_TRACKER).replace(base / TRACKER)
    fsync_dir(base)
    if replaced.exists():
        shutil.rmtree(replaced)
    return target


@dataclass(frozen=True)
class Retain:
    """Which checkpoints stay when a newer one is in place; the newest always does.

    ``interval`` is ``--save-retain-interval``: as upstream, the checkpoint before the newest goes
    unless ``interval`` divides its iteration. ``latest`` keeps that many of the newest, and those
    that ``interval`` divides.
    """

    interval: int | None = None
    latest: int | None = None

    def superseded(self, iterations: list[int], newest: int, previous: int | None) -> list[int]:
        """Those of ``iterations`` to remove now that ``newest`` is in place of ``previous``."""
        if self.latest is not None:
            candidates = [i for i in sorted(iterations) if i <= newest][: -max(self.latest, 1)]
        elif self.interval is not None:
            candidates = [previous] if previous in iterations else []
        else:
            return []
        return [i for i in candidates if i != newest and not (self.interval and i % self.interval == 0)]


def remove(base: str | os.PathLike, iteration: int) -> None:
    """Remove a checkpoint; interrupted, it leaves nothing that looks like one."""
    doomed = Path(base) / f"{_REMOVED}iter_{iteration:07d}"
    checkpoint_dir(base, iteration).rename(doomed)
    shutil.rmtree(doomed)


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
