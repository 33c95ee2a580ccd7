"""How often each id of a tokenizer occurs in a corpus, by group (input file and source).

Counts come from JSON lines or parquet (any number of worker processes), from a .bin/.idx dataset, or from
files written before; they add up, so that machines can count their own shares.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_ext.common.files import load_arrays, unchanged, write_aside
from megatron_ext.common.progress import Progress
from megatron_ext.data.indexed import DatasetError, dataset_files, map_tokens
from megatron_ext.data.manifest import check_dataset, read_manifest
from megatron_ext.data.text.chunks import Chunk, chunks
from megatron_ext.data.text.documents import (
    Document,
    Documents,
    LeftOut,
    StoppedAtBadLine,
    bad_line_message,
    require_documents,
)
from megatron_ext.data.text.pool import Note, run_chunks
from megatron_ext.data.text.sources import Source
from megatron_ext.tokenizer.checked import SLOW_PATH, EncodersDiffer
from megatron_ext.tokenizer.compress import TextEncoder
from megatron_ext.tokenizer.encoding import refusals

FORMAT = "megatron_ext.token_counts/1"
CHUNK_BYTES = 4 << 20
TEXTS_AT_ONCE = 512


@dataclass
class Counts:
    """Occurrences of each id in each group.

    Attributes:
        tokenizer_sha256: of the model file that the ids belong to.
        groups: names, e.g. "train_zh/oi_wiki".
        counts: int64 [groups, vocabulary].
        text_bytes: int64 [groups], UTF-8.
        documents: int64 [groups].
    """

    tokenizer_sha256: str
    groups: list[str]
    counts: np.ndarray
    text_bytes: np.ndarray
    documents: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Over all groups, int64 [vocabulary]."""
        return self.counts.sum(axis=0)

    @classmethod
    def empty(cls, tokenizer_sha256: str, vocab_size: int) -> Counts:
        """No group yet."""
        zeros = np.zeros(0, dtype=np.int64)
        return cls(tokenizer_sha256, [], np.zeros((0, vocab_size), dtype=np.int64), zeros, zeros)

    def add(self, group: str, counts: np.ndarray, text_bytes: int, documents: int) -> None:
        """Adds to a group, which is made if it is new."""
        if group not in self.groups:
            self.groups.append(group)
            self.counts = np.vstack([self.counts, np.zeros((1, self.counts.shape[1]), dtype=np.int64)])
            self.text_bytes = np.append(self.text_bytes, 0)
            self.documents = np.append(self.documents, 0)
        row = self.groups.index(group)
        self.counts[row] += counts
        self.text_bytes[row] += text_bytes
        self.documents[row] += documents

    def merge(self, other: Counts, name: str = "counts") -> None:
        """Adds another machine's counts.

        Raises:
            ValueError: they were made with another tokenizer.
        """
        if other.tokenizer_sha256 != self.tokenizer_sha256 or other.counts.shape[1] != self.counts.shape[1]:
            raise ValueError(f"{name}: counted with another tokenizer model; count again with this one")
        for row, group in enumerate(other.groups):
            self.add(group, other.counts[row], int(other.text_bytes[row]), int(other.documents[row]))

    def save(self, path: str | Path) -> None:
        """Writes a .npz file, whole or not at all."""
        path = Path(path)

        def write(file: BinaryIO) -> None:
            np.savez_compressed(
                file,
                format=np.array(FORMAT),
                tokenizer_sha256=np.array(self.tokenizer_sha256),
                groups=np.array(self.groups, dtype=np.str_),
                counts=self.counts,
                text_bytes=self.text_bytes,
                documents=self.documents,
            )

        write_aside(path, write)

    @classmethod
    def load(cls, path: str | Path) -> Counts:
        """Reads what ``save`` wrote; nothing is unpickled.

        Raises:
            ValueError: the file holds no counts.
        """
        try:
            data = load_arrays(Path(path))
            if str(data["format"]) != FORMAT:
                raise ValueError(f"its format is {data['format']}")
            groups = [str(group) for group in data["groups"]]
            arrays = (data["counts"], data["text_bytes"], data["documents"])
            return cls(str(data["tokenizer_sha256"]), groups, *arrays)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: not a file of token counts ({error})") from error


@dataclass
class ChunkCounts:
    """What a worker found in a chunk: of each source counts, text bytes and documents; the lines left out."""

    groups: dict[str, tuple[np.ndarray, list[int]]]
    left_out: list[tuple[int, str]]


def count_chunk(chunk: Chunk, note: Note, encoder: TextEncoder, key: str, on_bad_line: str) -> ChunkCounts:
    """Counts a chunk; runs in a worker process.

    Raises:
        StoppedAtBadLine: a line cannot be used and ``on_bad_line`` is "stop".
    """
    waiting: dict[str, list[Document]] = {}
    found = ChunkCounts({}, [])

    def flush(source: str, batch: list[Document]) -> None:
        note(batch[0].place, batch[-1].place)
        texts = [text for document in batch for text in document.texts[0]]
        counts = np.zeros(encoder.vocab_size, dtype=np.int64)
        try:
            with refusals():
                encoder.add_histogram(texts, counts)
        except ValueError as error:
            if isinstance(differ := error.__cause__, EncodersDiffer):
                raise StoppedAtBadLine(batch[differ.text].place, differ.reason, SLOW_PATH) from None
            if len(batch) == 1:
                found.left_out.append(left_out(batch[0].place, str(error), on_bad_line))
                return
            for document in batch:  # find the one that fails
                flush(source, [document])
            return
        total, sizes = found.groups.setdefault(source, (np.zeros_like(counts), [0, 0]))
        total += counts
        sizes[0] += sum(map(len, texts))
        sizes[1] += len(batch)

    for document in Documents(chunk, [key]):
        if isinstance(document, Document):
            source = document.source
            batch = waiting.setdefault(source, [])
            batch.append(document)
            if len(batch) == TEXTS_AT_ONCE:
                flush(source, waiting.pop(source))
        else:
            found.left_out.append(left_out(document.place, document.reason, on_bad_line))
    for source, batch in waiting.items():
        flush(source, batch)
    return found


def left_out(place: int, reason: str, on_bad_line: str) -> tuple[int, str]:
    """What is noted of a line that cannot be used, where it may be left out."""
    if on_bad_line == "stop":
        raise StoppedAtBadLine(place, reason)
    return place, reason


def group_name(path: str, source: str) -> str:
    """The group of a document: its file without endings, and its source."""
    stem = Path(path).name.split(".")[0]
    return f"{stem}/{source}" if source else stem


def count_text(
    sources: Sequence[Source],
    encoder: TextEncoder,
    tokenizer_sha256: str,
    workers: int = 1,
    key: str = "text",
    on_bad_line: str = "stop",
    progress: Progress | None = None,
) -> tuple[Counts, LeftOut]:
    """Counts the ids of the documents of ``sources``, and says which lines were left out.

    Args:
        on_bad_line: "stop" or "skip".
        progress: is told of text, documents and tokens.

    Raises:
        ValueError: a source cannot be read or changes meanwhile, holds no document, or a line cannot be used.
        WorkerFailed: a worker died; names the lines that it was at.
    """
    counts, skipped = Counts.empty(tokenizer_sha256, encoder.vocab_size), LeftOut()
    documents = [0] * len(sources)

    def done(chunk: Chunk, found: ChunkCounts) -> None:
        for source, (total, (text_bytes, number)) in found.groups.items():
            counts.add(group_name(chunk.path, source), total, text_bytes, number)
            documents[chunk.source] += number
            if progress is not None:
                progress.add_text(text_bytes, text_bytes, number, int(total.sum()))
        for place, reason in found.left_out:
            documents[chunk.source] += 1
            skipped.add(chunk, place, reason)

    work = functools.partial(count_chunk, encoder=encoder, key=key, on_bad_line=on_bad_line)
    with unchanged(source.path for source in sources):
        failure = run_chunks(chunks(list(sources), CHUNK_BYTES), workers, work, done)
    if failure is not None:
        raise ValueError(
            bad_line_message(failure.chunk, failure.line, failure.reason, "skip", failure.remedy)
        )
    require_documents(sources, documents, on_bad_line)
    order = np.argsort(counts.groups)  # workers finish in any order
    counts.groups = [counts.groups[i] for i in order]
    counts.counts = counts.counts[order]
    counts.text_bytes, counts.documents = counts.text_bytes[order], counts.documents[order]
    return counts, skipped


def count_dataset(prefix: str, token_bytes: np.ndarray, tokenizer_sha256: str) -> Counts:
    """Counts the ids of PREFIX.bin; text bytes are those the ids stand for.

    Args:
        token_bytes: how many bytes each id stands for, int32 [vocabulary].

    Raises:
        ValueError: the dataset is damaged, changes meanwhile, is of another tokenizer, or has ids outside the
            vocabulary.
    """
    vocab_size = len(token_bytes)
    with unchanged(dataset_files(prefix)):
        index = check_dataset(prefix)
        made_with = ((read_manifest(prefix) or {}).get("tokenizer") or {}).get("sha256")
        if made_with not in (None, tokenizer_sha256):
            raise DatasetError(f"{prefix}.bin: was made with another tokenizer; count it with that one")
        tokens = map_tokens(prefix, index)
        histogram = np.zeros(vocab_size, dtype=np.int64)
        for begin in range(0, len(tokens), 1 << 24):
            found = np.bincount(tokens[begin : begin + (1 << 24)], minlength=vocab_size)
            if len(found) > vocab_size:
                raise DatasetError(f"{prefix}.bin: id {len(found) - 1} is outside the {vocab_size} pieces")
            histogram += found
    text_bytes = int(histogram @ token_bytes.astype(np.int64))
    counts = Counts.empty(tokenizer_sha256, vocab_size)
    counts.add(Path(prefix).name, histogram, text_bytes, len(index.documents) - 1)
    return counts
