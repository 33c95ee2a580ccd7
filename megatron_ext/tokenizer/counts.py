"""How often each id of a tokenizer occurs in a corpus, by group (input file and source).

Counts come from JSON lines (any number of worker processes), from a .bin/.idx dataset, or from files written
before; they add up, so that machines can count their own shares.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.data.files import write_aside
from megatron_ext.data.indexed import check_layout, map_tokens
from megatron_ext.data.preprocess.progress import Progress
from megatron_ext.data.preprocess.sources import Chunk, Source, chunks, find_sources
from megatron_ext.data.preprocess.worker import _lines as lines_of
from megatron_ext.tokenizer.bits_per_byte import sentencepiece_bytes
from megatron_ext.tokenizer.encoder import NativeEncoder

FORMAT = "megatron_ext.token_counts/1"
CHUNK_BYTES = 4 << 20
TEXTS_AT_ONCE = 512
#: What a worker needs, inherited by fork.
_worker: dict = {}


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

        def write(file) -> None:
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
            with np.load(path, allow_pickle=False) as data:
                if str(data["format"]) != FORMAT:
                    raise ValueError(f"its format is {data['format']}")
                groups = [str(group) for group in data["groups"]]
                arrays = (data["counts"], data["text_bytes"], data["documents"])
                return cls(str(data["tokenizer_sha256"]), groups, *arrays)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: not a file of token counts ({error})") from error


def read_documents(chunk: Chunk, key: str) -> Iterator[tuple[str, str]]:
    """(source, text) of each line of a chunk; the source is the record's own ``source`` up to the first "/".

    Raises:
        ValueError: a line is no JSON object with that key, or the file is damaged; names file and line.
    """
    for number, line in enumerate(lines_of(chunk), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text, source = record[key], record.get("source", "")
            if not isinstance(text, str):
                raise TypeError(f"the value of {key!r} is not text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            where = (
                f"line {number} of the part at byte {chunk.begin}" if chunk.text is None else f"{line[:60]!r}"
            )
            raise ValueError(
                f"{chunk.path}: {where}: no JSON object with the text under {key!r} "
                f"({type(error).__name__}: {error}); set --json-key or repair the file"
            ) from error
        yield str(source).split("/")[0], text
    if chunk.damage:
        raise ValueError(f"{chunk.path}: {chunk.damage}")


def count_chunk(chunk: Chunk) -> list[tuple[str, np.ndarray, int, int]]:
    """(group, counts, text bytes, documents) of each source in a chunk; runs in a worker process."""
    encoder: NativeEncoder = _worker["encoder"]
    texts: dict[str, list[str]] = {}
    totals: dict[str, tuple[np.ndarray, list[int]]] = {}

    def flush(source: str) -> None:
        batch = texts.pop(source, [])
        counts, sizes = totals.setdefault(source, (np.zeros(encoder.vocab_size, dtype=np.int64), [0, 0]))
        encoder.add_histogram(batch, counts)
        sizes[0] += sum(len(text.encode()) for text in batch)
        sizes[1] += len(batch)

    for source, text in read_documents(chunk, _worker["key"]):
        texts.setdefault(source, []).append(text)
        if len(texts[source]) == TEXTS_AT_ONCE:
            flush(source)
    for source in list(texts):
        flush(source)
    stem = Path(chunk.path).name.split(".")[0]
    return [(f"{stem}/{source}" if source else stem, c, *sizes) for source, (c, sizes) in totals.items()]


def count_text(
    inputs: Sequence[str],
    encoder: NativeEncoder,
    tokenizer_sha256: str,
    workers: int = 1,
    key: str = "text",
    progress: Progress | None = None,
) -> Counts:
    """Counts JSON lines: files (.gz, .zst, .xz, .bz2 too), folders, globs.

    Args:
        progress: is told of text, documents and tokens.

    Raises:
        ValueError: a source cannot be read or a line cannot be used.
    """
    sources: list[Source] = find_sources(list(inputs))
    counts = Counts.empty(tokenizer_sha256, encoder.vocab_size)
    _worker.update(encoder=encoder, key=key)
    parts = chunks(sources, CHUNK_BYTES)
    with contextlib.ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(multiprocessing.get_context("fork").Pool(workers))
            results = pool.imap_unordered(count_chunk, parts)
        else:
            results = map(count_chunk, parts)
        for result in results:
            for group, found, text_bytes, documents in result:
                counts.add(group, found, text_bytes, documents)
                if progress is not None:
                    progress.add(text_bytes, text_bytes, documents, int(found.sum()))
    order = np.argsort(counts.groups)  # workers finish in any order
    counts.groups = [counts.groups[i] for i in order]
    counts.counts = counts.counts[order]
    counts.text_bytes, counts.documents = counts.text_bytes[order], counts.documents[order]
    return counts


def count_dataset(prefix: str, encoder: NativeEncoder, tokenizer_sha256: str) -> Counts:
    """Counts the ids of PREFIX.bin; text bytes are those the ids stand for.

    Raises:
        ValueError: the dataset is damaged or has ids outside the vocabulary.
    """
    index = check_layout(prefix)
    tokens = map_tokens(prefix, index)
    histogram = np.zeros(encoder.vocab_size, dtype=np.int64)
    for begin in range(0, len(tokens), 1 << 24):
        found = np.bincount(tokens[begin : begin + (1 << 24)], minlength=encoder.vocab_size)
        if len(found) > encoder.vocab_size:
            raise ValueError(f"{prefix}.bin: id {len(found) - 1} is outside the {encoder.vocab_size} pieces")
        histogram += found
    text_bytes = int(histogram @ sentencepiece_bytes(encoder.processor).astype(np.int64))
    counts = Counts.empty(tokenizer_sha256, encoder.vocab_size)
    counts.add(Path(prefix).name, histogram, text_bytes, len(index.documents) - 1)
    return counts
