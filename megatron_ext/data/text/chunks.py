"""Input files cut into chunks of bounded size, at line ends.

A plain file is cut into byte ranges that workers read for themselves: a range owns the lines that
begin in it. So is a parquet file, into ranges of rows. A compressed file or a pipe is read by one process,
which cuts it at line ends.
"""

import io
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from megatron_ext.common.files import FileState, input_changed, sha256
from megatron_ext.data.text import parquet
from megatron_ext.data.text.parquet import RowRange
from megatron_ext.data.text.sources import STDIN, Source, refuse_other_text, require_zstandard
from megatron_ext.data.text.unpack import (
    BUFFER,
    MAGIC_BYTES,
    HashingReader,
    SourceError,
    is_damage,
    kind_of,
    unpacked,
)


class Unit(NamedTuple):
    """What is not divided between shards: a range of a file, or a whole stream.

    Attributes:
        source: number of the source.
        begin, end: bytes of a plain file or a stream, rows of a parquet file.
        size: bytes on disk.
        rows: of a parquet file, the same by row groups.
    """

    source: int
    begin: int
    end: int
    size: int
    rows: tuple[RowRange, ...] | None = None


@dataclass
class Chunk:
    """A unit of work: a range of a plain or parquet file, or text read from a stream.

    Attributes:
        number: place among all chunks of the run.
        source: number of the source.
        begin, end: bytes of a plain file, rows of a parquet file.
        state: of such a file when the run began.
        rows: of a parquet file, the same by row groups; None for others.
        text: of a stream, whole lines; None for files that workers read.
        lines_before: of a stream, lines in front of the chunk; None for others.
        damage: why a stream ended too early, if it did.
        sha256: of all bytes of the source, in the last chunk of a stream.
        size: bytes of the source, as they lie on disk; for the progress.
    """

    number: int
    source: int
    path: str
    begin: int = 0
    end: int = 0
    state: FileState | None = None
    rows: tuple[RowRange, ...] | None = None
    text: bytes | None = None
    lines_before: int | None = None
    damage: str | None = None
    sha256: str | None = None
    size: int = 0

    def fingerprint(self) -> str:
        """Tells apart chunks of streams; those of other files are told apart by the plan."""
        if self.text is None:
            return f"{self.begin}-{self.end}"
        return sha256(self.text + (self.damage or "").encode())


def chunks(sources: list[Source], chunk_bytes: int, shard: tuple[int, int] | None = None) -> Iterator[Chunk]:
    """Cut the sources, or the part ``shard`` of them, into chunks, in order.

    Raises:
        SourceError: a stream is UTF-16, or cannot be unpacked by this Python.
        InputChanged: the file of a stream was written to while it was read.
    """
    number = 0
    for unit in units(sources, chunk_bytes, shard):
        source = sources[unit.source]
        cuts = [range_of(unit, source)] if source.is_cut_in_ranges else _cut_stream(source, unit, chunk_bytes)
        for chunk in cuts:
            chunk.number = number
            yield chunk
            number += 1


def range_of(unit: Unit, source: Source) -> Chunk:
    """The chunk of a range of a file."""
    return Chunk(
        0, unit.source, source.path, unit.begin, unit.end, source.state, rows=unit.rows, size=unit.size
    )  # fmt: skip


def units(sources: list[Source], chunk_bytes: int, shard: tuple[int, int] | None) -> list[Unit]:
    """What is not divided between shards, in order; of one shard if that is given.

    Shards are contiguous: the outputs of shards 0 to n - 1, merged, equal the output of one run.
    """
    found = [unit for which, source in enumerate(sources) for unit in _units_of(which, source, chunk_bytes)]
    if shard is None:
        return found
    total = sum(unit.size for unit in found) or 1
    mine, before = [], 0
    for unit in found:
        middle = before + unit.size / 2
        before += unit.size
        if min(int(middle * shard[1] / total), shard[1] - 1) == shard[0]:
            mine.append(unit)
    return mine


def _units_of(which: int, source: Source, chunk_bytes: int) -> Iterator[Unit]:
    size = source.bytes or 0
    if source.kind == "parquet":
        total = max(1, sum(group.rows for group in source.row_groups))
        begin = 0
        for rows in parquet.cut(source.row_groups, chunk_bytes):
            end = begin + sum(part.end - part.begin for part in rows)
            yield Unit(which, begin, end, end * size // total - begin * size // total, rows)
            begin = end
        return
    step = chunk_bytes if source.kind == "plain" else max(size, 1)
    for begin in range(0, max(size, 1), step):
        end = min(begin + step, size)
        yield Unit(which, begin, end, end - begin)


def lines_of(chunk: Chunk) -> Iterator[bytes]:
    """The lines of a stream's chunk, or those that begin in a file's range, with their ends.

    Raises:
        InputChanged: the file is not as it was when the run began.
    """
    if chunk.text is not None:
        begin = 0
        while begin < len(chunk.text):
            end = chunk.text.find(b"\n", begin) + 1 or len(chunk.text)
            yield chunk.text[begin:end]
            begin = end
        return
    try:
        file = open(chunk.path, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise input_changed(chunk.path) from None
    with file:
        _require_state(chunk, file.fileno())
        yield from _lines_of_range(file, chunk.begin, chunk.end)
        _require_state(chunk, file.fileno())


def _lines_of_range(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    if begin:
        file.seek(begin - 1)
        # In pieces: the line that began before may be longer than memory.
        while not (piece := file.readline(1 << 20)).endswith(b"\n"):
            if not piece or file.tell() >= end:
                return
    position = file.tell()
    while position < end and (line := file.readline()):
        yield line
        position += len(line)


def require_state(chunk: Chunk) -> None:
    """Raise InputChanged if a chunk's file is not as it was when the run began."""
    try:
        _require_state(chunk, chunk.path)
    except FileNotFoundError:
        raise input_changed(chunk.path) from None


def _require_state(chunk: Chunk, file: int | str) -> None:
    if chunk.state is not None and not FileState.of(file).is_as(chunk.state):
        raise input_changed(chunk.path)


def place_name(chunk: Chunk, first: int, last: int | None = None) -> str:
    """Names line or row ``first``, or ``first`` to ``last``, from 1 within the chunk, as places of its file.

    Of a plain file what lies before is read.
    """
    if chunk.rows is not None:
        names = [
            f"row group {group}, row {row}"
            for group, row in (row_of(chunk, i) for i in (first, last or first))
        ]
        return names[0] if last is None else f"{names[0]} to {names[1]}"
    before = count_lines(chunk.path, chunk.begin) if chunk.lines_before is None else chunk.lines_before
    return f"line {before + first}" if last is None else f"lines {before + first} to {before + last}"


def row_of(chunk: Chunk, place: int) -> tuple[int, int]:
    """Row group, and row in it, of a place in a parquet file's chunk."""
    for group, begin, end in chunk.rows or ():
        if place <= end - begin:
            return group, begin + place - 1
        place -= end - begin
    raise IndexError(f"{chunk.path}: the chunk ends before")


def count_lines(path: str, end: int) -> int:
    """Lines that begin in the first ``end`` bytes of a file."""
    if end == 0:
        return 0
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while end > 0 and (block := file.read(min(BUFFER, end))):
            count += block.count(b"\n")
            end, last = end - len(block), block[-1:]
    return count + (last != b"\n")


def _cut_stream(source: Source, unit: Unit, chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of a stream; each ends at the first line end at or after ``chunk_bytes``."""
    rest, lines, position, first, damage = bytearray(), 0, 0, True, None
    raw = _open(source)
    before, hashing = _regular_state(raw), HashingReader(raw)
    try:
        try:
            stream = _text_of(source, hashing)
            # read1 hands over what it has: of an archive that is cut off, all that can be read.
            while block := stream.read1(BUFFER):
                searched = max(chunk_bytes - 1, len(rest))
                rest += block
                if first:
                    refuse_other_text(source.path, bytes(rest[:4]))
                first = False
                while (cut := rest.find(b"\n", searched)) >= 0:
                    text = bytes(rest[: cut + 1])
                    size, position = _tell(raw) - position, _tell(raw)
                    yield Chunk(0, unit.source, source.path, text=text, lines_before=lines, size=size)
                    lines += text.count(b"\n")
                    del rest[: cut + 1]
                    searched = chunk_bytes - 1
        except Exception as error:
            if not is_damage(error):
                raise
            damage = f"the {source.kind} data is damaged or cut off: {error}"
        sha256 = hashing.finish()
        if before is not None and not _is_as(before, source, raw):
            raise input_changed(source.path)
    finally:
        if source.path != STDIN:
            raw.close()
    yield Chunk(
        0, unit.source, source.path, text=bytes(rest), lines_before=lines, damage=damage, sha256=sha256,
        size=max(0, unit.size - position),
    )  # fmt: skip


def _open(source: Source) -> io.BufferedIOBase:
    if source.path != STDIN:
        return open(source.path, "rb")
    if sys.stdin is None:
        raise SourceError("--input -: standard input is closed")
    return sys.stdin.buffer  # type: ignore[return-value]  # it is one


def _text_of(source: Source, hashing: HashingReader) -> io.BufferedIOBase:
    packed, kind = io.BufferedReader(hashing, BUFFER), source.kind
    if kind == "pipe":
        kind = kind_of(packed.peek(MAGIC_BYTES)[:MAGIC_BYTES])
        if kind == "zstd":
            require_zstandard(source.path)
    return unpacked(packed, kind)


def _regular_state(raw: io.BufferedIOBase) -> FileState | None:
    """The state of an open file; None for a pipe."""
    try:
        is_file = stat.S_ISREG(os.fstat(raw.fileno()).st_mode)
    except (OSError, ValueError):  # a stream of another kind in the place of standard input
        return None
    return FileState.of(raw.fileno()) if is_file else None


def _is_as(before: FileState, source: Source, raw: io.BufferedIOBase) -> bool:
    """Whether a stream's file is, after it was read, what it was before, and when the run began."""
    same = before.is_as(FileState.of(raw.fileno()))
    return same and (source.state is None or before.is_as(source.state))


def _tell(raw: io.BufferedIOBase) -> int:
    try:
        return raw.tell()
    except OSError:  # a pipe
        return 0
