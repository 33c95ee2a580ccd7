"""The .bin/.idx format of Megatron-Core's IndexedDataset, in pure NumPy.

A dataset PREFIX is two files. ``PREFIX.bin`` holds the concatenated ids of all sequences.
``PREFIX.idx`` holds, little-endian: the magic ``MMIDIDX\\0\\0``, version (uint64, 1), dtype code
(uint8), number of sequences N and of document bounds D (uint64 each), then sequence lengths
(int32 [N]), byte offsets in .bin (int64 [N]) and document bounds (int64 [D]: 0, ..., N).
Source: megatron/core/datasets/indexed_dataset.py; without torch it opens in milliseconds.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_ext.data.errors import DatasetError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32,
    5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in DTYPE_OF_CODE.items()}


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def dataset_files(prefix: str | Path) -> list[Path]:
    """All files of a dataset; the last one, the manifest, need not exist."""
    return [bin_path(prefix), idx_path(prefix), manifest_path(prefix)]


def optimal_dtype(vocab_size: int) -> np.dtype:
    """uint16 for vocabularies below 65,500, otherwise int32 (upstream's DType.optimal_dtype)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass
class Index:
    """A .idx file, mapped into memory."""

    dtype: np.dtype
    lengths: np.ndarray  # int32 [sequences]
    pointers: np.ndarray  # int64 [sequences], byte offsets in .bin
    documents: np.ndarray  # int64 [documents + 1], sequence numbers

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


def read_index(prefix: str | Path) -> Index:
    """Map PREFIX.idx into memory.

    Raises:
        DatasetError: no such file, not an index, or cut off.
    """
    path = idx_path(prefix)
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DatasetError(f"{path}: not the index of a dataset; make it with tools/preprocess_data.py")
    _, version, code, sequences, bounds = HEADER.unpack(header)
    if version != 1 or code not in DTYPE_OF_CODE:
        raise DatasetError(f"{path}: index of an unknown kind (version {version}, dtype code {code})")
    expected = HEADER.size + 12 * sequences + 8 * bounds
    size = path.stat().st_size
    if size < expected:
        raise DatasetError(f"{path}: truncated, {size:,} of {expected:,} bytes; make the dataset again")
    data = np.memmap(path, mode="r", dtype=np.uint8)
    lengths_end = HEADER.size + 4 * sequences
    pointers_end = lengths_end + 8 * sequences
    return Index(
        np.dtype(DTYPE_OF_CODE[code]),
        np.frombuffer(data, np.int32, sequences, HEADER.size),
        np.frombuffer(data, np.int64, sequences, lengths_end),
        np.frombuffer(data, np.int64, bounds, pointers_end),
    )


class Writable(Protocol):
    """A file, or a wrapper of one that computes a hash."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def write_index(file: Writable, dtype: np.dtype, lengths: np.ndarray, documents: np.ndarray) -> None:
    """Write an index, byte for byte as Megatron-Core's IndexedDatasetBuilder does.

    ``lengths`` int32 [sequences], ``documents`` int64 [documents + 1].
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int32)
    pointers = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= np.dtype(dtype).itemsize
    file.write(HEADER.pack(MAGIC, 1, CODE_OF_DTYPE[np.dtype(dtype)], len(lengths), len(documents)))
    for array in (lengths, pointers, np.ascontiguousarray(documents, dtype=np.int64)):
        file.write(array.data)


def map_tokens(prefix: str | Path, index: Index) -> np.ndarray:
    """All ids of PREFIX.bin in one array, mapped into memory."""
    path = bin_path(prefix)
    if path.stat().st_size == 0:
        return np.empty(0, dtype=index.dtype)
    return np.memmap(path, mode="r", dtype=index.dtype)


def check_layout(prefix: str | Path) -> Index:
    """Read the index, and check that .bin and .idx belong together.

    Takes a fraction of a second for millions of documents; the ids themselves are not read.

    Raises:
        DatasetError: a file is missing, cut off, or belongs to another dataset.
    """
    index = read_index(prefix)
    data = bin_path(prefix)
    if not data.is_file():
        raise DatasetError(f"{data}: there is no such file, though {idx_path(prefix).name} is there")
    if index.dtype.kind not in "iu":
        raise DatasetError(f"{idx_path(prefix)}: holds {index.dtype}, which are no token ids")
    needed = index.num_tokens * index.dtype.itemsize
    size = os.path.getsize(data)
    if size < needed:
        raise DatasetError(
            f"{data}: {size:,} bytes, but its index speaks of {needed:,}: the file is truncated, or "
            f"{idx_path(prefix).name} is of another dataset; copy both again or make the dataset again"
        )
    if size > needed:
        raise DatasetError(
            f"{data}: {size:,} bytes, but its index speaks of {needed:,}: "
            f"{idx_path(prefix).name} is of another dataset; copy both again or make the dataset again"
        )
    _check_index(prefix, index)
    return index


def _check_index(prefix: str | Path, index: Index) -> None:
    lengths, pointers, documents = index.lengths, index.pointers, index.documents
    steps = np.diff(pointers) == lengths[:-1].astype(np.int64) * index.dtype.itemsize
    sound = (
        (len(lengths) == 0 or (pointers[0] == 0 and lengths.min() >= 0))
        and bool(steps.all())
        and len(documents) > 0
        and documents[0] == 0
        and documents[-1] == len(lengths)
        and bool((np.diff(documents) >= 0).all())
    )
    if not sound:
        raise DatasetError(f"{idx_path(prefix)}: its offsets contradict each other; make the dataset again")
