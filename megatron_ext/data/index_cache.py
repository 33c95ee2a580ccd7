"""The index files of Megatron-Core's datasets, published whole.

Megatron-Core saves the document, sample and shuffle order of a dataset under the final names
while it computes them, and takes any file with such a name for complete: a job that is killed
meanwhile, or two jobs at once, leave indices that fail later or train on the wrong samples. Here
they are built in a folder of their own, which sees the sound files of the cache through links,
and each new file is then moved into place.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

BUILDING = ".building-"
#: A folder of a build that was killed is removed once it is older than this.
ABANDONED_AFTER_S = 24 * 3600


@contextmanager
def staging(cache: Path) -> Iterator[Path]:
    """A folder to build index files in; on success its new files move to ``cache``.

    Raises OSError if the cache cannot be written.
    """
    cache.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(cache)
    folder = Path(tempfile.mkdtemp(prefix=BUILDING, dir=cache))
    try:
        for entry in cache.iterdir():
            if entry.is_file() and is_sound(entry):
                (folder / entry.name).symlink_to(entry.absolute())
        yield folder
        for entry in folder.iterdir():
            if not entry.is_symlink():
                _publish(entry, cache / entry.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_sound(path: Path) -> bool:
    """Whether an index file is complete: an .npy file has the size that its header promises."""
    if path.suffix != ".npy":
        return path.stat().st_size > 0
    try:
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
    with open(source, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(source, target)


def _remove_abandoned(cache: Path) -> None:
    for folder in cache.glob(f"{BUILDING}*"):
        try:
            if time.time() - folder.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # another job removed it first
            pass
