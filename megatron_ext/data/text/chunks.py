"""Input files cut into chunks of bounded size, at line ends.

A plain file is cut into byte ranges that workers read for themselves: a range owns the lines that
begin in it. A compressed file or a pipe is read by one process, which cuts it at line ends.
"""

import io
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megatron_ext.common.files import FileState, input_changed, sha256
from megatron_ext.data.text.sources import (
    STDIN,
    Source,
    SourceError,
    refuse_wide_text,
    require_zstandard,
)
from megatron_ext.data.text.unpack import (
    BUFFER,
    MAGIC_BYTES,
    HashingReader,
    is_damage,
    kind_of,
    unpacked,
)


@dataclass
class Chunk:
    """A unit of work: bytes [begin, end) of a plain file, or text read from a stream.

    Attributes:
        number: place among all chunks of the run.
        source: number of the source.
        state: of a plain file when the run began.
        text: of a stream, whole lines; None for a plain file.
        lines_before: of a stream, lines in front of the chunk; None for a plain file.
        damage: why a stream ended too early, if it did.
        sha256: of all bytes of the source, in the last chunk of a stream.
        position: bytes of the source behind this chunk, as they lie on disk; for the progress.
    """

    number: int
    source: int
    path: str
    begin: int = 0
    end: int = 0
    state: FileState | None = None
    text: bytes | None = None
    lines_before: int | None = None
    damage: str | None = None
    sha256: str | None = None
    position: int = 0

    def fingerprint(self) -> str:
        """Tells apart chunks of streams; those of plain files are told apart by the plan."""
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
    for which, begin, end in units(sources, chunk_bytes, shard):
        source = sources[which]
        if source.kind == "plain":
            yield Chunk(number, which, source.path, begin, end, source.state, position=end)
            number += 1
            continue
        for chunk in _cut_stream(source, which, chunk_bytes):
            chunk.number = number
            yield chunk
            number += 1


def units(
    sources: list[Source], chunk_bytes: int, shard: tuple[int, int] | None
) -> list[tuple[int, int, int]]:
    """(source, begin, end) of what cannot be divided between shards: ranges, or whole streams.

    Shards are contiguous: the outputs of shards 0 to n - 1, merged, equal the output of one run.
    """
    units = []
    for which, source in enumerate(sources):
        size = source.bytes or 0
        step = chunk_bytes if source.kind == "plain" else max(size, 1)
        units += [(which, begin, min(begin + step, size)) for begin in range(0, max(size, 1), step)]
    if shard is None:
        return units
    total = sum(end - begin for _, begin, end in units) or 1
    mine, before = [], 0
    for unit in units:
        middle = before + (unit[2] - unit[1]) / 2
        before += unit[2] - unit[1]
        if min(int(middle * shard[1] / total), shard[1] - 1) == shard[0]:
            mine.append(unit)
    return mine


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
        _require_state(chunk, file)
        yield from _lines_of_range(file, chunk.begin, chunk.end)
        _require_state(chunk, file)


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


def _require_state(chunk: Chunk, file: BinaryIO) -> None:
    if chunk.state is not None and not FileState.of(file.fileno()).is_as(chunk.state):
        raise input_changed(chunk.path)


def line_number(chunk: Chunk, line: int) -> int:
    """Line ``line`` of the chunk, from 1, counted in its file; of a plain file what lies before is read."""
    before = count_lines(chunk.path, chunk.begin) if chunk.lines_before is None else chunk.lines_before
    return before + line


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


def _cut_stream(source: Source, which: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of a stream; each ends at the first line end at or after ``chunk_bytes``."""
    rest, lines, first, damage = bytearray(), 0, True, None
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
                    refuse_wide_text(source.path, bytes(rest[:4]))
                first = False
                while (cut := rest.find(b"\n", searched)) >= 0:
                    text = bytes(rest[: cut + 1])
                    yield Chunk(0, which, source.path, text=text, lines_before=lines, position=_tell(raw))
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
        0, which, source.path, text=bytes(rest), lines_before=lines, damage=damage, sha256=sha256,
        position=source.bytes or 0,
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
