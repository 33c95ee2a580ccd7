"""Files: atomic writes, hashes, and checks that inputs are neither overwritten nor changed while read."""

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Limit of an unpacked .npz: counts of a hundred sources over a vocabulary of a million need half of it.
_MAX_ARRAY_BYTES = 1 << 31
#: A manifest names its format within this many bytes.
_MANIFEST_START = 1 << 12


class OverwritesInput(ValueError):
    """An output is also an input; the message names both."""


class InputChanged(ValueError):
    """A file was written to, replaced or removed while it was read; the message names it."""


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Load the arrays of an .npz file; nothing is unpickled.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not an .npz file, or would unpack to more than 2 GiB.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(record.file_size for record in archive.infolist())
        if size > _MAX_ARRAY_BYTES:
            raise ValueError(f"it would unpack to {size} bytes")
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"it is no .npz file: {error}") from error


def write_aside(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a temporary file next to ``path``, then rename it to ``path``.

    ``content`` may be a function that writes to the open file. The content is on disk before the rename: a
    crash leaves either the old file or the new one.

    Raises:
        OSError: naming ``path``, not the temporary file.
    """
    with _naming(path):
        _write_aside(path, content)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make OSErrors inside the context name ``path``, unless they name another file of the user."""
    try:
        yield
    except OSError as error:
        own = error.filename is None or Path(str(error.filename)).name.startswith(f".{path.name}.")
        if not own or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _write_aside(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file atomically."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_aside(path, text.encode("utf-8", "backslashreplace") + b"\n")


def write_picture(figure: "Figure", path: Path) -> None:
    """Write a matplotlib figure atomically, in the format of the name's suffix (by default PNG)."""
    picture_format = path.suffix.lstrip(".") or "png"
    write_aside(path, lambda file: figure.savefig(file, format=picture_format, dpi=120))


def sha256(data: bytes | str) -> str:
    """sha256 of bytes, or of a text in UTF-8, as a hexadecimal string."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's content, as a hexadecimal string."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


#: Number and size of the pieces of ``pieces_digest``; files up to their total are read completely.
PIECES, PIECE_BYTES = 256, 1 << 16


def pieces_digest(path: str | Path) -> str:
    """sha256 of a file's length and of evenly spread pieces; files up to 16 MiB are hashed completely.

    Takes hundredths of a second for any size. It detects another file of the same length, a zeroed range or a
    part of another file, but not a single changed byte of a large file.
    """
    size = os.path.getsize(path)
    last = max(0, size - PIECE_BYTES)
    starts: Sequence[int] = range(0, last + 1, PIECE_BYTES)
    if len(starts) > PIECES:
        starts = [last * i // (PIECES - 1) for i in range(PIECES)]
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in (*starts, last):
            file.seek(start)
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


class FileState(NamedTuple):
    """Status that changes when a file is modified or replaced; links and permissions change ``status_ns``."""

    size: int
    modified_ns: int
    inode: int
    device: int
    status_ns: int

    @classmethod
    def of(cls, file: str | Path | int) -> "FileState":
        """The state of a path or of a file descriptor."""
        status = os.stat(file)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev, status.st_ctime_ns)

    def is_as(self, other: "FileState") -> bool:
        """Whether size, modification time and inode are the same."""
        return self[:4] == other[:4]


def input_changed(path: str | Path) -> InputChanged:
    """The error for a file that changed while it was read."""
    return InputChanged(
        f"{path}: was written to, replaced or removed while it was read. Nothing was written; start again "
        "when the file is complete"
    )


class Watch:
    """Watches input files for changes; files that are missing at the start are not watched."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.before = {path: state for path in paths if (state := _state(path)) is not None}

    def check(self) -> None:
        """Raise InputChanged for the first file that has changed."""
        for path, state in self.before.items():
            if _state(path) != state:
                raise input_changed(path)


@contextlib.contextmanager
def unchanged(paths: Iterable[str | Path]) -> Iterator[Watch]:
    """Check that files do not change inside the context; a change replaces other errors.

    Raises:
        InputChanged: at the end, naming the first file that has changed.
    """
    watch = Watch(paths)
    try:
        yield watch
    except Exception:
        watch.check()
        raise
    watch.check()


def _state(path: str | Path) -> FileState | None:
    try:
        return FileState.of(path) if os.path.isfile(path) else None
    except OSError:
        return None


def refuse_overwriting(outputs: Iterable[str | Path], inputs: Iterable[str | Path]) -> None:
    """Raise if an output is one of the inputs, by any spelling, or a folder that contains one.

    Args:
        outputs: every file that will be written or removed, with all suffixes; a folder for all its content.
        inputs: every file and folder that will be read.

    Raises:
        OverwritesInput: naming both.
    """
    by_path: dict[str, str | Path] = {}
    by_inode: dict[tuple[int, int] | None, str | Path] = {}
    for path in outputs:
        by_path[os.path.realpath(path)] = path
        if (inode := _inode(path)) is not None:
            by_inode[inode] = path
    for path in inputs:
        real = Path(os.path.realpath(path))
        for place in (real, *real.parents):
            output = by_path.get(str(place)) or by_inode.get(_inode(place))
            if output is not None:
                is_or_holds = "is" if place == real else "holds"
                raise OverwritesInput(
                    f"{output}: would be written or removed, and {is_or_holds} the input {path}; give "
                    "another output"
                )


def refuse_replacing(manifest: str | Path, form: str) -> None:
    """Raise if the path of a manifest of format ``form`` is taken by another kind of file.

    A manifest's name is derived from another file's, so the user has not agreed to replace this file.

    Raises:
        OverwritesInput: naming it.
    """
    try:
        with open(manifest, "rb") as file:
            start = file.read(_MANIFEST_START)
    except FileNotFoundError:
        return
    if f'"{form}"'.encode() not in start:
        raise OverwritesInput(
            f"{manifest}: is no manifest of {form}, whose place this is; move it, or give another output"
        )


def is_same_place(one: str | Path, other: str | Path) -> bool:
    """Whether two names refer to the same file or folder, which need not exist yet."""
    inode = _inode(one)
    same_inode = inode is not None and inode == _inode(other)
    return same_inode or os.path.realpath(one) == os.path.realpath(other)


def _inode(path: str | Path) -> tuple[int, int] | None:
    """Device and inode, the same for all spellings of a name; None if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
