"""Files that appear whole or not at all."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_aside(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write(file)`` write a file beside ``path``, then put it in place in one step.

    The content is on disk before the name is: a crash leaves the old file or the new one.
    """
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_picture(figure, path: Path) -> None:
    """Put a matplotlib figure in place in one step, in the format that the name ends in (PNG without one)."""
    picture_format = path.suffix.lstrip(".") or "png"
    write_aside(path, lambda file: figure.savefig(file, format=picture_format, dpi=120))


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
    starts = range(0, last + 1, PIECE_BYTES)
    if len(starts) > PIECES:
        starts = [last * i // (PIECES - 1) for i in range(PIECES)]
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in (*starts, last):
            file.seek(start)
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
