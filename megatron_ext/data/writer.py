"""Writes a dataset: .bin and .idx under temporary names, then published with the manifest last."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ext.common.files import pieces_digest
from megatron_ext.common.lock import open_locked
from megatron_ext.data.indexed import bin_path, idx_path, manifest_path, write_index
from megatron_ext.data.manifest import write_manifest


@dataclass
class Written:
    """A dataset that is complete on disk, but not published yet.

    ``files`` holds size and checksums of "bin" and "idx", as in the manifest. ``lock``, the .idx, is locked
    until it is published or removed: two runs must not write the same dataset.
    """

    prefix: str
    lock: BinaryIO
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def counts(self) -> dict[str, Any]:
        """The part of the manifest that is known here."""
        return {
            "documents": self.documents,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "files": self.files,
        }

    def discard(self) -> None:
        """Remove the files."""
        for suffix in ("bin", "idx"):
            _aside(self.prefix, suffix).unlink(missing_ok=True)
        self.lock.close()


def write_dataset(
    prefix: str | Path, blocks: Iterable[bytes], dtype: np.dtype, lengths: np.ndarray, documents: np.ndarray
) -> Written:
    """Write ids and index of a new dataset to temporary files; ``publish`` renames them.

    Args:
        blocks: the bytes of .bin, in order.
        dtype: type of the ids.
        lengths: number of ids of each sequence, int32 [sequences]; read after all blocks are written.
        documents: bounds of the documents in sequences, int64 [documents + 1], from 0.

    Raises:
        OSError: another run is writing a dataset of this name, or the disk is full.
    """
    written = Written(str(prefix), _lock(_aside(prefix, "idx")))
    try:
        with open(_aside(prefix, "bin"), "wb") as raw:
            written.files["bin"] = _write(raw, lambda file: _copy(blocks, file))
        written.files["idx"] = _write(written.lock, lambda file: write_index(file, dtype, lengths, documents))
        written.documents, written.sequences = len(documents) - 1, len(lengths)
        written.tokens = int(lengths.sum(dtype=np.int64))
        if written.files["bin"]["bytes"] != written.tokens * np.dtype(dtype).itemsize:
            raise AssertionError(f"{prefix}: {written.files['bin']['bytes']} bytes for {written.tokens} ids")
    except BaseException:
        written.discard()
        raise
    return written


def _lock(path: Path) -> BinaryIO:
    """Create an empty file that is locked by this process as long as it is open."""
    try:
        file = open(path, "r+b", opener=lambda *_: open_locked(path, inherited=True))  # noqa: SIM115 - of Written
    except BlockingIOError:
        raise OSError(f"{path}: another run is writing this output; wait for it, or stop it") from None
    file.truncate(0)
    return file


def publish(written: Written, manifest: dict[str, Any]) -> None:
    """Rename the files. A dataset with a manifest is complete; one without may not be."""
    prefix = written.prefix
    manifest_path(prefix).unlink(missing_ok=True)
    idx_path(prefix).unlink(missing_ok=True)
    os.replace(_aside(prefix, "bin"), bin_path(prefix))
    os.replace(_aside(prefix, "idx"), idx_path(prefix))
    write_manifest(prefix, written.counts() | manifest)
    written.lock.close()


def file_blocks(path: Path, size: int = 1 << 22) -> Iterable[bytes]:
    """The content of a file, in blocks."""
    with open(path, "rb") as file:
        while block := file.read(size):
            yield block


def _aside(prefix: str | Path, suffix: str) -> Path:
    return Path(f"{prefix}.{suffix}.aside")


def _copy(blocks: Iterable[bytes], file: "_Hashing") -> None:
    for block in blocks:
        file.write(block)


class _Hashing:
    """A file that computes the sha256 of its content."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.file.write(data)


def _write(raw: BinaryIO, write: Callable[["_Hashing"], object]) -> dict[str, Any]:
    """Write an open file and wait until it is on disk; returns its entry in the manifest."""
    file = _Hashing(raw)
    write(file)
    raw.flush()
    os.fsync(raw.fileno())
    return {
        "bytes": os.fstat(raw.fileno()).st_size,
        "sha256": file.digest.hexdigest(),
        "pieces_sha256": pieces_digest(raw.name),
    }
