"""Input files, and how they are cut into chunks.

A plain file is cut into byte ranges that workers read for themselves: a range owns the lines that
begin in it. A compressed file or a pipe is read by one process, which cuts it at line ends.
"""

import bz2
import glob
import gzip
import hashlib
import io
import lzma
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

STDIN = "-"
BLOCK = 1 << 20
ZSTD_BLOCK = 1 << 12  # small: a few packed bytes may be much text
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED_SUFFIXES = ("", ".gz", ".zst", ".xz", ".bz2")
MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",  # a frame to be skipped comes first, as pzstd writes it
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
}
STREAM_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


class SourceError(ValueError):
    """An input that is not there or cannot be opened."""


@dataclass(frozen=True)
class Source:
    """One input; ``kind`` is "plain", "pipe" or a compression, the numbers are None for pipes."""

    path: str
    kind: str
    bytes: int | None = None
    modified_ns: int | None = None


@dataclass
class Chunk:
    """A unit of work: bytes [begin, end) of a plain file, or text read from a stream.

    Attributes:
        number: place among all chunks of the run.
        source: number of the source.
        text: of a stream, whole lines; None for a plain file.
        damage: why a stream ended too early, if it did.
        position: bytes of the source behind this chunk, as they lie on disk; for the progress.
    """

    number: int
    source: int
    path: str
    begin: int = 0
    end: int = 0
    text: bytes | None = None
    damage: str | None = None
    position: int = 0

    def fingerprint(self) -> str:
        """Tells apart chunks of streams; those of plain files are told apart by the plan."""
        if self.text is None:
            return f"{self.begin}-{self.end}"
        return hashlib.sha256(self.text + (self.damage or "").encode()).hexdigest()


def find_sources(inputs: list[str]) -> list[Source]:
    """The input files in the order of ``inputs``; globs and folders in the order of their names.

    Raises:
        SourceError: nothing there, not readable, or a compression that this Python cannot read.
    """
    return [_source(path) for word in inputs for path in _expand(word)]


def _expand(word: str) -> list[str]:
    if word == STDIN:
        return [STDIN]
    path = Path(word)
    if path.is_dir():
        names = sorted(str(entry) for entry in path.rglob("*") if entry.is_file() and _is_json(entry.name))
        if not names:
            raise SourceError(
                f"--input {word}: the folder holds no .jsonl or .json files (also .gz, .zst, .xz)"
            )
        return names
    if path.exists():
        return [word]
    if names := sorted(name for name in glob.glob(word, recursive=True) if os.path.isfile(name)):
        return names
    what = "no file matches" if glob.has_magic(word) else "there is no such file"
    raise SourceError(f"--input {word}: {what}")


def _is_json(name: str) -> bool:
    endings = tuple(json + packed for json in JSON_SUFFIXES for packed in COMPRESSED_SUFFIXES)
    return name.endswith(endings)


def _source(path: str) -> Source:
    if path == STDIN:
        return Source(path, "pipe")
    try:
        status = os.stat(path)
        if not os.path.isfile(path):
            return Source(path, "pipe")
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise SourceError(f"--input {path}: {error.strerror}") from error
    kind = next((name for magic, name in MAGICS.items() if start.startswith(magic)), "plain")
    if kind == "zstd":
        _zstandard(path)
    return Source(path, kind, status.st_size, status.st_mtime_ns)


def _zstandard(path: str):
    try:
        import zstandard
    except ImportError:
        raise SourceError(
            f"--input {path}: zstd files need: pip install zstandard (or: zstdcat FILE | ... --input -)"
        ) from None
    return zstandard


def chunks(sources: list[Source], chunk_bytes: int, shard: tuple[int, int] | None = None) -> Iterator[Chunk]:
    """Cut the sources, or the part ``shard`` of them, into chunks, in order."""
    number = 0
    for which, unit_begin, unit_end in units(sources, chunk_bytes, shard):
        source = sources[which]
        if source.kind == "plain":
            yield Chunk(number, which, source.path, unit_begin, unit_end, position=unit_end)
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


def _cut_stream(source: Source, which: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of a stream; each ends at the first line end at or after ``chunk_bytes``."""
    rest, damage, raw = bytearray(), None, None
    try:
        raw, stream = _open_stream(source)
        # read1 hands over what it has: of an archive that is cut off, all that can be read.
        while block := stream.read1(BLOCK):
            searched = max(chunk_bytes - 1, len(rest))
            rest += block
            while (cut := rest.find(b"\n", searched)) >= 0:
                yield Chunk(0, which, source.path, text=bytes(rest[: cut + 1]), position=_tell(raw))
                del rest[: cut + 1]
                searched = chunk_bytes - 1
    except STREAM_ERRORS as error:
        damage = f"the {source.kind} data is damaged or cut off: {error}"
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        damage = f"the zstd data is damaged or cut off: {error}"
    finally:
        if raw is not None and source.path != STDIN:
            raw.close()
    yield Chunk(0, which, source.path, text=bytes(rest), damage=damage, position=source.bytes or 0)


def _open_stream(source: Source) -> tuple[BinaryIO, BinaryIO]:
    raw = sys.stdin.buffer if source.path == STDIN else open(source.path, "rb")  # noqa: SIM115
    if source.kind == "gzip":
        return raw, gzip.GzipFile(fileobj=raw)
    if source.kind == "xz":
        return raw, lzma.LZMAFile(raw)
    if source.kind == "bzip2":
        return raw, bz2.BZ2File(raw)
    if source.kind == "zstd":
        return raw, open_zstd(raw)
    return raw, raw


class _ZstdFrames(io.RawIOBase):
    """The text of zstd frames; zstandard's own reader takes a file that was cut off for one that ended."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self.raw, self.decompressor = raw, zstandard.ZstdDecompressor()
        self.frame = None
        self.packed, self.text = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.raw.close()
        super().close()

    def readinto(self, buffer) -> int:
        while not self.text:
            self.packed = self.packed or self.raw.read(ZSTD_BLOCK)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            self._decompress()
        size = min(len(buffer), len(self.text))
        buffer[:size] = self.text[:size]
        self.text = self.text[size:]
        return size

    def _decompress(self) -> None:
        self.frame = self.frame or self.decompressor.decompressobj()
        self.text = memoryview(self.frame.decompress(self.packed))
        self.packed = b""
        if self.frame.eof:
            self.packed, self.frame = self.frame.unused_data, None


def open_zstd(raw: BinaryIO) -> BinaryIO:
    """The text of a zstd file; reading raises EOFError where the file was cut off."""
    return io.BufferedReader(_ZstdFrames(raw), BLOCK)


def _tell(raw: BinaryIO) -> int:
    try:
        return raw.tell()
    except OSError:  # a pipe
        return 0
