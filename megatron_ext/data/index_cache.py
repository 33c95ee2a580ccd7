"""The index files of Megatron-Core's datasets, published whole, each beside its checksum.

Megatron-Core saves the document, sample and shuffle order of a dataset under the final names
while it computes them, and takes any file with such a name for complete: a job that is killed
meanwhile, or two jobs at once, leave indices that fail later or train on the wrong samples. Here
they are built in a folder of their own, which sees the sound files of the cache through links,
and each new file is then moved into place. ``NAME.sha256`` is there before NAME is; the files of a
cache that Megatron-LM made have none, and are known by their size only.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_ext.common.files import sha256_file, write_aside
from megatron_ext.common.lock import try_lock
from megatron_ext.data.indexed import DatasetError

BUILDING, CHECKSUM = ".building-", ".sha256"
#: Locked in the folder of a build as long as the process that builds lives.
LOCK = ".lock"
#: A folder of a build that was killed is removed once it is older than this and its lock is free.
ABANDONED_AFTER_S = 24 * 3600
#: Files that are read at the same time to be compared with their checksums.
_READERS = 4

logger = logging.getLogger(__name__)


def fill(cache: Path, build: Callable[[Path], object]) -> None:
    """Let ``build(folder)`` make the datasets of a run, with the index files that ``cache`` lacks put there.

    Every index file that the datasets use is compared with its checksum; one that was altered is
    reported by name and built again.

    Raises OSError if the cache cannot be written or read, and what ``build`` raises.
    """
    with _staging(cache) as folder:
        try:
            damaged = _damaged(folder, _hashes(build(folder)))
        except DatasetError:
            # Perhaps because of the damage.
            damaged = _damaged(folder, None)
            if not damaged:
                raise
        if damaged:
            for link in damaged:
                logger.warning(f"{cache / link.name}: was altered since it was built; it is built again")
            _unlink(folder, {_dataset_of(link) for link in damaged})
            build(folder)


def _hashes(built: Any) -> set[str]:
    """What the names of the index files of these datasets begin with."""
    if isinstance(built, list | tuple):
        return set().union(*map(_hashes, built))
    if built is None:
        return set()
    parts = _hashes(built.datasets) if isinstance(built, BlendedDataset) else set()
    return parts | {built.unique_description_hash}


def _dataset_of(path: Path) -> str:
    """``HASH-KIND-SPLIT`` of a file ``HASH-KIND-SPLIT-sample_index.npy``."""
    return path.name.rpartition("-")[0]


def _files_of(dataset: str) -> int:
    """Files of a dataset in the cache: its description and two indices of a blend, three of others."""
    return 3 if "-BlendedDataset-" in dataset else 4


def _unlink(folder: Path, datasets: set[str]) -> None:
    """Remove all links of these datasets: a dataset is built whole, and would be written through them."""
    for entry in list(folder.iterdir()):
        if entry.is_symlink() and _dataset_of(entry) in datasets:
            entry.unlink()


def _damaged(folder: Path, hashes: set[str] | None) -> list[Path]:
    """The links to files that are not what was written, of those with the hashes; None is all."""
    links = [entry for entry in folder.iterdir() if entry.is_symlink()]
    used = [link for link in links if hashes is None or link.name.split("-")[0] in hashes]
    with ThreadPoolExecutor(_READERS) as threads:
        return [link for link, same in zip(used, threads.map(_is_same, used), strict=True) if not same]


def _is_same(link: Path) -> bool:
    path = link.readlink()
    try:
        return sha256_file(path) == _checksum_of(path).read_text().strip()
    except FileNotFoundError:
        return True


def _checksum_of(path: Path) -> Path:
    return path.with_name(path.name + CHECKSUM)


@contextmanager
def _staging(cache: Path) -> Iterator[Path]:
    """A folder to build index files in; on success its new files move to ``cache``."""
    cache.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(cache)
    folder = Path(tempfile.mkdtemp(prefix=BUILDING, dir=cache))
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try_lock(lock)
        unsound = set()
        files = [entry for entry in cache.iterdir() if _is_index_file(entry)]
        for entry in files:
            (folder / entry.name).symlink_to(entry.absolute())
            if not is_sound(entry):
                unsound.add(_dataset_of(entry))
        counts = Counter(map(_dataset_of, files))
        _unlink(folder, unsound | {name for name, count in counts.items() if count < _files_of(name)})
        yield folder
        for entry in folder.iterdir():
            if not entry.is_symlink() and entry.name != LOCK:
                _publish(entry, cache / entry.name)
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _is_index_file(entry: Path) -> bool:
    """Not a checksum, and not what another job is writing at this moment: such names begin with a dot."""
    return entry.suffix != CHECKSUM and not entry.name.startswith(".") and entry.is_file()


def is_sound(path: Path) -> bool:
    """Whether an index file is complete: an .npy file has the size that its header promises."""
    try:
        if path.suffix != ".npy":
            return path.stat().st_size > 0
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(file)
            if dtype.hasobject:  # would be unpickled when it is loaded
                return False
            return file.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize == path.stat().st_size
    except (OSError, ValueError, KeyError):
        return False


def _publish(source: Path, target: Path) -> None:
    write_aside(_checksum_of(target), sha256_file(source).encode())
    with open(source, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(source, target)


def _remove_abandoned(cache: Path) -> None:
    for folder in cache.glob(f"{BUILDING}*"):
        with contextlib.suppress(OSError):  # another job removed it first
            if time.time() - folder.stat().st_mtime > ABANDONED_AFTER_S and not _is_alive(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_alive(folder: Path) -> bool:
    """Whether the process that builds there still holds its lock; clocks and dates may be wrong."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:  # of an earlier version
        return False
    try:
        return not try_lock(lock)
    finally:
        os.close(lock)
