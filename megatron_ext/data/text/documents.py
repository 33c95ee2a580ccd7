"""The documents of a chunk: the one reader of JSON lines and parquet, of all tools that take text.

What a line or row means, and whether it can be used, is settled here and in ``records`` alone. A document
knows its place and its texts, and nothing of what it was read from.
"""

import codecs
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_ext.data.text.chunks import Chunk, lines_of, place_name, require_state
from megatron_ext.data.text.parquet import Damaged, Row, RowRange, read_rows
from megatron_ext.data.text.records import BadLine, Texts, load_record, text_of_value, texts_of
from megatron_ext.data.text.sources import Source

#: Left-out lines that a message names.
NAMED = 3


class Document(NamedTuple):
    """A document that can be used.

    Attributes:
        place: its line or row, from 1 within the chunk.
        raw: the line itself, or the texts of the row.
        texts: of each key, as UTF-8.
        source: where the record says it is from, up to the first "/"; "" if it does not say.
    """

    place: int
    raw: bytes
    texts: list[Texts]
    source: str


class BadDocument(NamedTuple):
    """One that cannot be used, for ``reason``; ``raw`` is empty where nothing could be read."""

    place: int
    raw: bytes
    reason: str


class StoppedAtBadLine(Exception):
    """--on-bad-line stop met one; ``line`` counts from 1 within the chunk.

    ``remedy`` is what to do, where that is not to mend the line or leave it out.
    """

    def __init__(self, line: int, reason: str, remedy: str = "") -> None:
        super().__init__(line, reason, remedy)
        self.line, self.reason, self.remedy = line, reason, remedy


class NoDocuments(ValueError):
    """An input without a single document; the message names it."""


class Documents:
    """The documents of a chunk, in order, once.

    Blank lines are passed over, and so is a byte order mark in front of a line: Windows puts it at the
    start of a file, and files are joined.

    Attributes:
        lines, blank_lines, bytes: what was read so far; lines are those of a parquet file's rows too.
        digest: of the lines or rows read so far.

    Raises:
        InputChanged: while iterating; the file is not as it was when the run began.
    """

    def __init__(self, chunk: Chunk, keys: Sequence[str]) -> None:
        self.chunk, self.keys = chunk, keys
        self.lines = self.blank_lines = self.bytes = 0
        self.digest = new_digest()

    def __iter__(self) -> Iterator[Document | BadDocument]:
        return self._of_lines() if self.chunk.rows is None else self._of_rows(self.chunk.rows)

    def _of_lines(self) -> Iterator[Document | BadDocument]:
        for line in lines_of(self.chunk):
            if self.chunk.damage and not line.endswith(b"\n"):
                break
            self.lines += 1
            self.bytes += len(line)
            self.digest.update(line)
            text = line.removeprefix(codecs.BOM_UTF8)
            if not text or text.isspace():
                self.blank_lines += 1
            else:
                yield self._document(text)
        if self.chunk.damage:
            yield BadDocument(self.lines + 1, b"", self.chunk.damage)

    def _document(self, line: bytes) -> Document | BadDocument:
        try:
            record = load_record(line, self.keys)
            texts = [texts_of(record, key) for key in self.keys]
        except BadLine as error:
            return BadDocument(self.lines, line, str(error))
        return Document(self.lines, line, texts, _source(record))

    def _of_rows(self, ranges: Sequence[RowRange]) -> Iterator[Document | BadDocument]:
        require_state(self.chunk)
        for part in ranges:
            end = self.lines + part.end - part.begin
            try:
                for row in read_rows(self.chunk.path, self.chunk.state, self.keys, part):
                    yield self._document_of_row(row)
            except Damaged as error:
                require_state(self.chunk)
                while self.lines < end:
                    self.lines += 1
                    yield BadDocument(self.lines, b"", str(error))
        require_state(self.chunk)

    def _document_of_row(self, row: Row) -> Document | BadDocument:
        found = [value for value in row.values if value]
        raw = found[0] if len(found) == 1 else b"\n".join(found)
        self.lines += 1
        self.bytes += len(raw)
        self.digest.update(raw)
        self.digest.update(b"\n")
        try:
            texts = [text_of_value(value, key) for value, key in zip(row.values, self.keys, strict=True)]
        except BadLine as error:
            return BadDocument(self.lines, raw, str(error))
        return Document(self.lines, raw, texts, _first_part((row.source or b"").decode("utf-8", "replace")))


def _source(record: dict[str, Any]) -> str:
    return _first_part(str(record["source"])) if "source" in record else ""


def _first_part(source: str) -> str:
    return source.partition("/")[0].encode("utf-8", "replace").decode()


def new_digest() -> "hashlib._Hash":
    """The hash by which what two processes read of a file is compared."""
    return hashlib.sha256()


def bad_line_message(chunk: Chunk, line: int, reason: str, ways: str, remedy: str = "") -> str:
    """Names file and line (``line`` counts from 1 within the chunk), and the ``ways`` to leave it out."""
    what = "line" if chunk.rows is None else "row"
    remedy = remedy or f"mend the {what}, or leave such {what}s out with --on-bad-line {ways}"
    return f"{chunk.path}: {place_name(chunk, line)}: {reason}. Nothing was written; {remedy}"


def require_documents(sources: Sequence[Source], found: Sequence[int], on_bad_line: str) -> list[str]:
    """Names of the sources without documents, good or bad (``found`` of each), that look like a fault.

    A parquet file of no rows is none: it is what a filter leaves of a shard, and is said on stderr.

    Raises:
        NoDocuments: there are such, and bad input ends the run, or there is nothing else.
    """
    without = [source for source, count in zip(sources, found, strict=True) if count == 0]
    if without and len(without) == len(sources):
        raise NoDocuments(f"{without[0].path}: holds no documents. Nothing was written")
    empty = [source.path for source in without if source.kind != "parquet"]
    if empty and on_bad_line == "stop":
        raise NoDocuments(
            f"{empty[0]}: holds no documents. Nothing was written; leave it out, or give --on-bad-line skip"
        )
    if shards := [source.path for source in without if source.kind == "parquet"]:
        print(
            f"WARNING: parquet files without rows: {', '.join(shards[:NAMED])}"
            f"{f' and {len(shards) - NAMED} more' if len(shards) > NAMED else ''}",
            file=sys.stderr,
        )
    return empty


@dataclass
class LeftOut:
    """Lines that --on-bad-line skip left out: how many, and the first of them by name."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, chunk: Chunk, line: int, reason: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(f"{chunk.path}: {place_name(chunk, line)}: {reason}")

    def __str__(self) -> str:
        more = "; ..." if self.count > len(self.named) else ""
        return f"left out {self.count:,} lines that cannot be used: {'; '.join(self.named)}{more}"
