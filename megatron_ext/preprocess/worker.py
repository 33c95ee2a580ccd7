"""One chunk -> one part of the dataset, written aside and marked complete.

A part is a few files ``part-000012.*`` in the work folder. Its marker ``part-000012.json`` appears
last and tells the sizes of the others: a part with a sound marker is never made again.
"""

import base64
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ext.data.text.chunks import Chunk, row_of
from megatron_ext.data.text.documents import BadDocument, Document, Documents, StoppedAtBadLine
from megatron_ext.data.text.pool import Note
from megatron_ext.data.text.records import Texts, content_hash
from megatron_ext.tokenizer.checked import FIRST, SLOW_PATH, Checked, Encode, Encoder, EncodersDiffer

#: Texts are encoded in batches of about this many bytes.
BATCH_BYTES = 1 << 20
#: The files that a part has for each key.
COLUMNS = ("sequences", "lengths", "bin")


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
    """What a marker says: counts of one chunk, ``digest`` of its lines, who encoded, sizes of its files."""

    number: int
    source: int
    fingerprint: str
    digest: str = ""
    lines: int = 0
    blank_lines: int = 0
    bytes: int = 0
    documents: int = 0
    empty_documents: int = 0
    bad_lines: int = 0
    encoder: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)


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


def process(chunk: Chunk, note: Note, recipe: Recipe, encoder: Encoder) -> Part:
    """Encode a chunk, write its part, and return the marker.

    Raises:
        StoppedAtBadLine: a line cannot be used and ``on_bad_line`` is "stop", or encoders differ in it.
        InputChanged: the file is not as it was when the run began.
    """
    documents = Documents(chunk, recipe.keys)
    with _Writer(chunk, recipe, encoder, note) as writer:
        for document in documents:
            if isinstance(document, Document):
                writer.add(document)
            else:
                writer.bad(document)
        return writer.finish(documents)


class _Writer:
    """Gathers documents into batches, and writes ids, lengths and notes of bad lines."""

    def __init__(self, chunk: Chunk, recipe: Recipe, encoder: Encoder, note: Note) -> None:
        self.chunk, self.recipe, self.note = chunk, recipe, note
        self.encode = Checked(encoder, FIRST if chunk.number == 0 else 0)
        self.part = Part(chunk.number, chunk.source, chunk.fingerprint())
        self.part.tokens = dict.fromkeys(recipe.keys, 0)
        self.files: dict[str, BinaryIO] = {}
        self.batch: list[Document] = []
        self.batch_bytes = 0

    def __enter__(self) -> "_Writer":
        # Removed and not written over: a worker of a run that was killed may still have them open.
        columns = [f"{key}.{what}" for key in range(len(self.recipe.keys)) for what in COLUMNS]
        for suffix in ("json", "json.aside", "bad", "hashes", *columns):
            part_file(self.recipe.folder, self.part.number, suffix).unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()

    def _file(self, suffix: str) -> BinaryIO:
        if suffix not in self.files:
            self.files[suffix] = open(part_file(self.recipe.folder, self.part.number, suffix), "xb")
        return self.files[suffix]

    def add(self, document: Document) -> None:
        self.batch.append(document)
        self.batch_bytes += len(document.raw)
        if self.batch_bytes >= BATCH_BYTES:
            self._flush()

    def bad(self, document: BadDocument) -> None:
        if self.recipe.on_bad_line == "stop":
            raise StoppedAtBadLine(document.place, document.reason)
        note: dict[str, Any] = {"line": document.place}
        if self.chunk.rows is not None:
            note["row_group"], note["row"] = row_of(self.chunk, document.place)
        note["reason"] = document.reason
        if self.recipe.on_bad_line == "quarantine" and document.raw:
            note |= _quote(document.raw)
        self.part.bad_lines += 1
        self._file("bad").write(json.dumps(note, ensure_ascii=False).encode() + b"\n")

    def _flush(self) -> None:
        batch, self.batch, self.batch_bytes = self.batch, [], 0
        if not batch:
            return
        self.note(batch[0].place, batch[-1].place)
        try:
            self._write(batch)
        except EncodersDiffer as error:
            raise StoppedAtBadLine(batch[error.text].place, error.reason, SLOW_PATH) from None
        except ValueError as error:
            if len(batch) == 1:
                self.bad(BadDocument(batch[0].place, batch[0].raw, str(error)))
                return
            for document in batch:  # find the one that fails
                self.batch = [document]
                self._flush()

    def _write(self, batch: list[Document]) -> None:
        encoded = [
            _documents([document.texts[k] for document in batch], self.encode, self.recipe.eod)
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
            self._file("hashes").write(b"".join(content_hash(document.texts) for document in batch))

    def finish(self, documents: Documents) -> Part:
        """The last batch and the marker; ``documents`` is read to its end."""
        self._flush()
        self.part.lines, self.part.blank_lines = documents.lines, documents.blank_lines
        self.part.encoder = self.encode.describe()
        self.part.bytes, self.part.digest = documents.bytes, documents.digest.hexdigest()
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

    Raises:
        EncodersDiffer: in the document of that number.

    Returns:
        ids [tokens], length of each sequence int32 [sequences], sequences of each document int32.
    """
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    try:
        ids, sizes = encode([sentence for document in documents for sentence in document])
    except EncodersDiffer as error:
        raise EncodersDiffer(int(owner[error.text]), error.reason) from None
    owner, lengths = owner[sizes > 0], sizes[sizes > 0].astype(np.int32)
    sequences = np.bincount(owner, minlength=len(documents)).astype(np.int32)
    if eod is not None and len(lengths):
        last = np.flatnonzero(np.diff(owner, append=-1))
        ids = np.insert(ids, np.cumsum(lengths, dtype=np.int64)[last], eod)
        lengths[last] += 1
    return ids, lengths, sequences


def _quote(line: bytes) -> dict[str, Any]:
    """The line itself, as text if it is text."""
    line = line.rstrip(b"\r\n")
    try:
        return {"content": line.decode("utf-8")}
    except UnicodeDecodeError:
        return {"content_base64": base64.b64encode(line).decode()}
