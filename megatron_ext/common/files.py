"""Files that appear whole or not at all, never over what is read, and read without a change meanwhile."""

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

#: What an .npz may unpack to: counts of a hundred sources over a vocabulary of a million take half of it.
_LARGEST_ARRAYS = 1 << 31
#: A manifest says its format within so many bytes.
_MANIFEST_START = 1 << 12


class OverwritesInput(ValueError):
    """What shall be written is what is read; the message names both."""


class InputChanged(ValueError):
    """A file was written to, replaced or removed while it was read; the message names it."""


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; nothing is unpickled.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or would unpack to more than 2 GiB.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(record.file_size for record in archive.infolist())
        if size > _LARGEST_ARRAYS:
            raise ValueError(f"it would unpack to {size} bytes")
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"it is no .npz file: {error}") from error


def write_aside(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file beside ``path``, then put it in place in one step.

    ``content`` may be a function that writes it to the open file. The content is on disk before the name
    is: a crash leaves the old file or the new one.

    Raises:
        OSError: naming ``path``, whatever the file beside it is called.
    """
    with _naming(path):
        _write_aside(path, content)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let errors of the system within it name ``path``, unless they name a file that the user knows."""
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
    """Put an indented JSON file in place in one step."""
    write_aside(
        path, json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    )


def write_picture(figure: "Figure", path: Path) -> None:
    """Put a matplotlib figure in place in one step, in the format that the name ends in (PNG without one)."""
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


#: A file up to all of these pieces is read whole by ``pieces_digest``.
PIECES, PIECE_BYTES = 256, 1 << 16


def pieces_digest(path: str | Path) -> str:
    """sha256 of a file's length and of pieces spread evenly over it; of up to 16 MiB, all of it.

    Takes hundredths of a second whatever the size: it tells another file of the same length, a part
    full of zeros or a piece of another file, though not a single changed byte of a long one.
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
    """What differs when a file was written to or replaced. Links and permissions change ``status_ns`` too."""

    size: int
    modified_ns: int
    inode: int
    device: int
    status_ns: int

    @classmethod
    def of(cls, file: str | Path | int) -> "FileState":
        """Of a path or of an open file's descriptor."""
        status = os.stat(file)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev, status.st_ctime_ns)

    def is_as(self, other: "FileState") -> bool:
        """Whether size, time of change and place are the same."""
        return self[:4] == other[:4]


def input_changed(path: str | Path) -> InputChanged:
    """The error for a file that changed while it was read."""
    return InputChanged(
        f"{path}: was written to, replaced or removed while it was read. Nothing was written; start again "
        "when the file is complete"
    )


class Watch:
    """Files that are read; those that are not there at the beginning are left to their readers."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.before = {path: state for path in paths if (state := _state(path)) is not None}

    def check(self) -> None:
        """Raise InputChanged for the first file that is not as it was."""
        for path, state in self.before.items():
            if _state(path) != state:
                raise input_changed(path)


@contextlib.contextmanager
def unchanged(paths: Iterable[str | Path]) -> Iterator[Watch]:
    """Within it files are read; a change of one of them is an error, also in place of another error.

    Raises:
        InputChanged: at the end, naming the first file that is not as it was.
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
    """Raise if an output is one of the inputs by any spelling, or a folder that holds one.

    Args:
        outputs: every file that will be written or removed, with all its endings; folders for all in them.
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
            found = by_path.get(str(place)) or by_inode.get(_inode(place))
            if found is not None:
                is_or_holds = "is" if place == real else "holds"
                raise OverwritesInput(
                    f"{found}: would be written or removed, and {is_or_holds} the input {path}; give another "
                    "output"
                )


def refuse_replacing(manifest: str | Path, form: str) -> None:
    """Raise if a file that is no manifest of the format ``form`` has the place where one will be written.

    A manifest's name follows from that of another file, so nobody has said that what is there may go.

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
    """Whether two names are of one file or folder, by any spelling; also of one that is not there yet."""
    inode = _inode(one)
    same_inode = inode is not None and inode == _inode(other)
    return same_inode or os.path.realpath(one) == os.path.realpath(other)


def _inode(path: str | Path) -> tuple[int, int] | None:
    """The same for all spellings, links and cases of a name; None where nothing is."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
