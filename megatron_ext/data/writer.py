"""A new dataset: .bin and .idx written under other names, then published with the manifest last."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.data.files import pieces_digest
from megatron_ext.data.indexed import bin_path, idx_path, manifest_path, write_index
from megatron_ext.data.manifest import write_manifest


@dataclass
class Written:
    """A dataset that is complete on disk, but not yet under its name.

    ``files`` holds size and checksums of "bin" and "idx", as the manifest has them.
    """

    prefix: str
    documents: int
    sequences: int
    tokens: int
    files: dict[str, dict]

    def counts(self) -> dict:
        """The manifest's entries that are known here."""
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


def write_dataset(
    prefix: str | Path, blocks: Iterable[bytes], dtype: np.dtype, lengths: np.ndarray, documents: np.ndarray
) -> Written:
    """Write ids and index of a new dataset beside their place; ``publish`` puts them there.

    Args:
        blocks: the bytes of .bin, in order.
        dtype: of the ids.
        lengths: ids of each sequence, int32 [sequences].
        documents: bounds of the documents in sequences, int64 [documents + 1], from 0.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    written = Written(str(prefix), len(documents) - 1, len(lengths), tokens, {})
    try:
        written.files["bin"] = _write(_aside(prefix, "bin"), lambda file: _copy(blocks, file))
        written.files["idx"] = _write(
            _aside(prefix, "idx"), lambda file: write_index(file, dtype, lengths, documents)
        )
    except BaseException:
        written.discard()
        raise
    if written.files["bin"]["bytes"] != tokens * np.dtype(dtype).itemsize:
        written.discard()
        raise AssertionError(f"{prefix}: {written.files['bin']['bytes']} bytes for {tokens} ids")
    return written


def publish(written: Written, manifest: dict) -> None:
    """Give the files their names. A dataset with a manifest is complete; one without may not be."""
    prefix = written.prefix
    manifest_path(prefix).unlink(missing_ok=True)
    idx_path(prefix).unlink(missing_ok=True)
    os.replace(_aside(prefix, "bin"), bin_path(prefix))
    os.replace(_aside(prefix, "idx"), idx_path(prefix))
    write_manifest(prefix, written.counts() | manifest)


def file_blocks(path: Path, size: int = 1 << 22) -> Iterable[bytes]:
    """The content of a file, in blocks."""
    with open(path, "rb") as file:
        while block := file.read(size):
            yield block


def _aside(prefix: str | Path, suffix: str) -> Path:
    return Path(f"{prefix}.{suffix}.aside")


def _copy(blocks: Iterable[bytes], file) -> None:
    for block in blocks:
        file.write(block)


class _Hashing:
    """A file that knows the sha256 of what was written to it."""

    def __init__(self, file) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data) -> None:
        self.digest.update(data)
        self.file.write(data)


def _write(path: Path, write: Callable) -> dict:
    """Write a file and wait until it is on disk; what the manifest says of it."""
    with open(path, "wb") as raw:
        file = _Hashing(raw)
        write(file)
        raw.flush()
        os.fsync(raw.fileno())
    return {
        "bytes": path.stat().st_size,
        "sha256": file.digest.hexdigest(),
        "pieces_sha256": pieces_digest(path),
    }
