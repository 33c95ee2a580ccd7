"""One chunk -> one part of the dataset, written aside and marked complete.

A part is a few files ``part-000012.*`` in the work folder. Its marker ``part-000012.json`` appears
last and tells the sizes of the others: a part with a sound marker is never made again.
"""

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megatron_ext.data.preprocess.encoding import Encode
from megatron_ext.data.preprocess.records import BadLine, Texts, content_hash, parse_line
from megatron_ext.data.preprocess.sources import Chunk

#: Texts are encoded in batches of about this many bytes.
BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """What the workers need of the options."""

    folder: Path
    keys: tuple[str, ...]
    eod: int | None
    on_bad_line: str
    hashes: bool


@dataclass
class Part:
    """What a marker says: counts of one chunk, sizes of its files."""

    number: int
    source: int
    fingerprint: str
    lines: int = 0
    blank_lines: int = 0
    bytes: int = 0
    documents: int = 0
    empty_documents: int = 0
    bad_lines: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)


class StoppedAtBadLine(Exception):
    """--on-bad-line stop met one; ``line`` counts from 1 within the chunk."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line, self.reason = line, reason


def part_file(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"part-{number:06d}.{suffix}"


def read_part(folder: Path, number: int) -> Part | None:
    """The marker of a part if it is complete."""
    try:
        part = Part(**json.loads(part_file(folder, number, "json").read_bytes()))
        sizes = {name: (folder / name).stat().st_size for name in part.files}
    except (OSError, ValueError, TypeError):
        return None
    return part if sizes == part.files else None


def process(chunk: Chunk, recipe: Recipe, encode: Encode) -> Part:
    """Encode a chunk, write its part, and return the marker.

    Raises:
        StoppedAtBadLine: a line cannot be used and ``on_bad_line`` is "stop".
    """
    with _Writer(chunk, recipe, encode) as writer:
        for line in _lines(chunk):
            if chunk.damage and not line.endswith(b"\n"):
                break
            writer.add(line)
        if chunk.damage:
            writer.bad(chunk.damage, b"", writer.part.lines + 1)
        return writer.finish()


def _lines(chunk: Chunk) -> Iterator[bytes]:
    """The lines of a stream's chunk, or those that begin in a file's range."""
    if chunk.text is not None:
        begin = 0
        while begin < len(chunk.text):
            end = chunk.text.find(b"\n", begin) + 1 or len(chunk.text)
            yield chunk.text[begin:end]
            begin = end
        return
    with open(chunk.path, "rb") as file:
        if chunk.begin:
            file.seek(chunk.begin - 1)
            # In pieces: the line that began before may be longer than memory.
            while not (piece := file.readline(1 << 20)).endswith(b"\n"):
                if not piece or file.tell() >= chunk.end:
                    return
        position = file.tell()
        while position < chunk.end and (line := file.readline()):
            yield line
            position += len(line)


class _Writer:
    """Gathers texts into batches, and writes ids, lengths and notes of bad lines."""

    def __init__(self, chunk: Chunk, recipe: Recipe, encode: Encode) -> None:
        self.recipe, self.encode = recipe, encode
        self.part = Part(chunk.number, chunk.source, chunk.fingerprint())
        self.part.tokens = dict.fromkeys(recipe.keys, 0)
        self.files = {}
        self.batch: list[tuple[int, bytes, list[Texts]]] = []
        self.batch_bytes = 0

    def __enter__(self) -> "_Writer":
        part_file(self.recipe.folder, self.part.number, "json").unlink(missing_ok=True)
        return self

    def __exit__(self, *_) -> None:
        for file in self.files.values():
            file.close()

    def _file(self, suffix: str):
        if suffix not in self.files:
            self.files[suffix] = open(part_file(self.recipe.folder, self.part.number, suffix), "wb")
        return self.files[suffix]

    def add(self, line: bytes) -> None:
        self.part.lines += 1
        self.part.bytes += len(line)
        if line.isspace():
            self.part.blank_lines += 1
            return
        try:
            record = parse_line(line, self.recipe.keys)
        except BadLine as error:
            self.bad(str(error), line)
            return
        self.batch.append((self.part.lines, line, record))
        self.batch_bytes += len(line)
        if self.batch_bytes >= BATCH_BYTES:
            self._flush()

    def bad(self, reason: str, line: bytes, number: int | None = None) -> None:
        number = self.part.lines if number is None else number
        if self.recipe.on_bad_line == "stop":
            raise StoppedAtBadLine(number, reason)
        note: dict = {"line": number, "reason": reason}
        if self.recipe.on_bad_line == "quarantine" and line:
            note |= _quote(line)
        self.part.bad_lines += 1
        self._file("bad").write(json.dumps(note, ensure_ascii=False).encode() + b"\n")

    def _flush(self) -> None:
        batch, self.batch, self.batch_bytes = self.batch, [], 0
        if not batch:
            return
        try:
            self._write(batch)
        except (ValueError, TypeError) as error:
            if len(batch) == 1:
                self.bad(f"cannot be encoded: {error}", batch[0][1], batch[0][0])
                return
            for entry in batch:  # find the one that fails
                self.batch = [entry]
                self._flush()

    def _write(self, batch: list[tuple[int, bytes, list[Texts]]]) -> None:
        encoded = [
            _documents([record[k] for _, _, record in batch], self.encode, self.recipe.eod)
            for k in range(len(self.recipe.keys))
        ]
        for key, (ids, lengths, sequences) in zip(self.recipe.keys, encoded, strict=True):
            number = self.recipe.keys.index(key)
            self._file(f"{number}.bin").write(ids.data)
            self._file(f"{number}.lengths").write(lengths.data)
            self._file(f"{number}.sequences").write(sequences.data)
            self.part.tokens[key] += len(ids)
        self.part.documents += len(batch)
        self.part.empty_documents += int((encoded[0][2] == 0).sum())
        if self.recipe.hashes:
            self._file("hashes").write(b"".join(content_hash(record) for _, _, record in batch))

    def finish(self) -> Part:
        self._flush()
        for file in self.files.values():
            file.close()
            self.part.files[Path(file.name).name] = os.path.getsize(file.name)
        marker = part_file(self.recipe.folder, self.part.number, "json")
        aside = marker.with_suffix(".json.aside")
        aside.write_text(json.dumps(asdict(self.part)))
        os.replace(aside, marker)
        return self.part


def _documents(
    documents: list[Texts], encode: Encode, eod: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode documents of sentences as Megatron-LM's Encoder.encode does.

    Sentences without ids are left out; ``eod`` ends the last sentence of a document that has ids.

    Returns:
        ids [tokens], length of each sequence int32 [sequences], sequences of each document int32.
    """
    ids, sizes = encode([sentence for document in documents for sentence in document])
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    owner, lengths = owner[sizes > 0], sizes[sizes > 0].astype(np.int32)
    sequences = np.bincount(owner, minlength=len(documents)).astype(np.int32)
    if eod is not None and len(lengths):
        last = np.flatnonzero(np.diff(owner, append=-1))
        ids = np.insert(ids, np.cumsum(lengths, dtype=np.int64)[last], eod)
        lengths[last] += 1
    return ids, lengths, sequences


def _quote(line: bytes) -> dict:
    """The line itself, as text if it is text."""
    line = line.rstrip(b"\r\n")
    try:
        return {"content": line.decode("utf-8")}
    except UnicodeDecodeError:
        return {"content_base64": base64.b64encode(line).decode()}
