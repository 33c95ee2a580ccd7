"""The index files of Megatron-Core's datasets, published atomically, each with a checksum.

Megatron-Core saves the document, sample and shuffle order of a dataset under the final names while it
computes them, and assumes that a file with such a name is complete: a job that is killed meanwhile, or two
jobs at once, leave indices that fail later or train on the wrong samples. Here they are built in a temporary
folder with links to the valid files of the cache, and each new file is then moved into the cache.
``NAME.sha256`` is published before NAME; the files of a Megatron-LM cache have none, and only their size is
checked.
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
#: Lock file in the folder of a build, held as long as the building process runs.
LOCK = ".lock"
#: The folder of a killed build is removed once it is older than this and its lock is free.
ABANDONED_AFTER_S = 24 * 3600
#: Number of files whose checksums are verified in parallel.
_READERS = 4

logger = logging.getLogger(__name__)


def fill(cache: Path, build: Callable[[Path], object]) -> None:
    """Run ``build(folder)`` to build the datasets of a run, and add new index files to ``cache``.

    Every index file that the datasets use is compared with its checksum; an altered one is reported by name
    and rebuilt.

    Raises OSError if the cache cannot be written or read, and any error of ``build``.
    """
    with _staging(cache) as folder:
        try:
            damaged = _damaged(folder, _hashes(build(folder)))
        except DatasetError:
            # Possibly because of a damaged file.
            damaged = _damaged(folder, None)
            if not damaged:
                raise
        if damaged:
            for link in damaged:
                logger.warning(f"{cache / link.name}: was altered since it was built; it is built again")
            _unlink(folder, {_dataset_of(link) for link in damaged})
            build(folder)


def _hashes(built: Any) -> set[str]:
    """The prefixes of the names of these datasets' index files."""
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
    """Number of files of a dataset: its description and two indices for a blend, otherwise three."""
    return 3 if "-BlendedDataset-" in dataset else 4


def _unlink(folder: Path, datasets: set[str]) -> None:
    """Remove all links of these datasets: they are rebuilt completely, and writes would follow the links."""
    for entry in list(folder.iterdir()):
        if entry.is_symlink() and _dataset_of(entry) in datasets:
            entry.unlink()


def _damaged(folder: Path, hashes: set[str] | None) -> list[Path]:
    """The links to damaged files, among those with these hashes; None checks all."""
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
    """A temporary folder for a build; on success its new files are moved to ``cache``."""
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
    """Excludes checksums, and temporary files of other jobs, whose names start with a dot."""
    return entry.suffix != CHECKSUM and not entry.name.startswith(".") and entry.is_file()


def is_sound(path: Path) -> bool:
    """Whether an index file is complete: an .npy file must have the size given by its header."""
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
            if dtype.hasobject:  # would be unpickled on load
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
        with contextlib.suppress(OSError):  # removed by another job
            if time.time() - folder.stat().st_mtime > ABANDONED_AFTER_S and not _is_alive(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_alive(folder: Path) -> bool:
    """Whether the building process still holds its lock; modification times may be wrong."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:  # left by an earlier version
        return False
    try:
        return not try_lock(lock)
    finally:
        os.close(lock)
