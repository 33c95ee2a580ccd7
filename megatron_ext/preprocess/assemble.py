"""The parts, in order -> the dataset of each key, and the list of lines left out."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_ext.common.files import write_aside
from megatron_ext.data.writer import Written, file_blocks, write_dataset
from megatron_ext.preprocess.worker import Part, part_file


def build(
    prefix: str, which: int, parts: list[Part], folder: Path, dtype: np.dtype, keep: np.ndarray | None
) -> Written:
    """Join the parts of key number ``which``; ``keep`` bool [documents] leaves out duplicates.

    Memory: 16 bytes a sequence and 12 a document, besides one part.
    """
    lengths = _column(parts, folder, f"{which}.lengths", np.int32)
    sequences = _column(parts, folder, f"{which}.sequences", np.int32)
    ids = [part_file(folder, part.number, f"{which}.bin") for part in parts]
    if keep is None:
        blocks: Iterable[bytes] = (block for path in ids if path.exists() for block in file_blocks(path))
    else:
        tokens = _sum_by(sequences, lengths)
        blocks = _kept_blocks(ids, [part.documents for part in parts], tokens, keep, dtype)
        lengths, sequences = lengths[np.repeat(keep, sequences)], sequences[keep]
    documents = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum(sequences, out=documents[1:])
    return write_dataset(prefix, blocks, dtype, lengths, documents)


def first_of_equals(parts: list[Part], folder: Path) -> np.ndarray:
    """Which documents are the first with their content: bool [documents]; 48 bytes each meanwhile."""
    hashes = _column(parts, folder, "hashes", np.uint64).reshape(-1, 2)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equals the first document comes first
    repeated = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    keep = np.ones(len(hashes), dtype=bool)
    keep[order[1:][repeated]] = False
    return keep


def write_bad_lines(
    path: Path,
    parts: list[Part],
    folder: Path,
    names: list[str],
    first_line: Callable[[Part], int],
    empty: Iterable[str],
) -> None:
    """One JSON object for each line that was left out: file, line (from 1), reason, content.

    Of parquet it is row group and row (from 0) in place of the line.
    """

    def write(file: BinaryIO) -> None:
        for part in parts:
            if not part.bad_lines:
                continue
            notes = map(json.loads, part_file(folder, part.number, "bad").read_bytes().splitlines())
            for note in sorted(notes, key=lambda note: note["line"]):
                place = note.pop("line") + first_line(part) - 1
                line = {"file": names[part.source]} | ({} if "row" in note else {"line": place}) | note
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        for name in empty:
            note = {"file": name, "line": 0, "reason": "the file holds no documents"}
            file.write(json.dumps(note, ensure_ascii=False).encode() + b"\n")

    write_aside(path, write)


def _column(parts: list[Part], folder: Path, suffix: str, dtype: type) -> np.ndarray:
    paths = (part_file(folder, part.number, suffix) for part in parts)
    columns = [np.fromfile(path, dtype=dtype) for path in paths if path.exists()]
    return np.concatenate(columns) if columns else np.empty(0, dtype=dtype)


def _sum_by(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums of consecutive groups of ``values``; group i has ``counts[i]`` members, perhaps none."""
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(counts, dtype=np.int64)
    return totals[ends] - totals[ends - counts]


def _kept_blocks(
    paths: Iterable[Path], documents: list[int], tokens: np.ndarray, keep: np.ndarray, dtype: np.dtype
) -> Iterable[bytes]:
    begin = 0
    for path, count in zip(paths, documents, strict=True):
        mine = slice(begin, begin + count)
        begin += count
        if count:
            yield np.fromfile(path, dtype=dtype)[np.repeat(keep[mine], tokens[mine])].tobytes()
