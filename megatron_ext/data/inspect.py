"""Inspects a dataset: statistics, a histogram of lengths, samples, and a check of every byte."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.common.files import sha256_file
from megatron_ext.data.indexed import DatasetError, Index, bin_path, map_tokens
from megatron_ext.data.manifest import TokenizerLike, check_dataset, manifest_path, read_manifest

BLOCK_IDS = 1 << 24


@dataclass
class Report:
    """Statistics of a dataset; ``histogram`` holds (from, below, documents) in powers of two."""

    documents: int
    sequences: int
    tokens: int
    dtype: str
    bytes: int
    empty_documents: int
    lengths: dict[str, float]
    histogram: list[tuple[int, int, int]]
    largest_id: int | None = None
    distinct_ids: int | None = None
    verified: list[str] | None = None


def report(prefix: str | Path, tokenizer: TokenizerLike | None = None) -> tuple[Report, Index]:
    """Statistics from the index only; the files are checked as in training.

    Raises:
        DatasetError: the dataset is damaged, or of another tokenizer.
    """
    index = check_dataset(prefix, tokenizer)
    lengths = document_lengths(index)
    facts = Report(
        documents=len(lengths),
        sequences=len(index.lengths),
        tokens=index.num_tokens,
        dtype=index.dtype.name,
        bytes=bin_path(prefix).stat().st_size,
        empty_documents=int((lengths == 0).sum()),
        lengths=_quantiles(lengths),
        histogram=histogram(lengths),
    )
    return facts, index


def document_lengths(index: Index) -> np.ndarray:
    """Number of ids of each document, int64 [documents]."""
    ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
    return np.diff(ends[index.documents])


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Number of documents with lengths in [0, 1), [1, 2), [2, 4), ...: (from, below, documents)."""
    if not len(lengths):
        return []
    edges = [0, 1]
    while edges[-1] <= lengths.max():
        edges.append(edges[-1] * 2)
    counts = np.histogram(lengths, bins=np.array(edges, dtype=np.float64))[0].tolist()
    bars = list(zip(edges, edges[1:], counts, strict=False))
    first = next(i for i, bar in enumerate(bars) if bar[2])
    return bars[first:]


def verify(prefix: str | Path, index: Index, facts: Report, vocab_size: int | None) -> None:
    """Read every id, and compare checksums and counts with the manifest; completes ``facts``.

    Raises:
        DatasetError: naming the file that differs.
    """
    largest, seen = -1, np.zeros(0, dtype=bool)
    ids = map_tokens(prefix, index)
    for start in range(0, len(ids), BLOCK_IDS):
        block = ids[start : start + BLOCK_IDS]
        if block.min() < 0:
            raise DatasetError(f"{bin_path(prefix)}: holds the id {block.min()}, which is below 0")
        largest = max(largest, int(block.max()))
        if vocab_size is not None and largest >= vocab_size:
            raise DatasetError(f"{bin_path(prefix)}: holds the id {largest}, the tokenizer has {vocab_size}")
        counts = np.bincount(block)
        seen = np.pad(seen, (0, max(0, len(counts) - len(seen))))
        seen[: len(counts)] |= counts > 0
    facts.largest_id, facts.distinct_ids = (largest, int(seen.sum())) if largest >= 0 else (None, 0)
    facts.verified = ["layout", "ids"] + _compare_with_manifest(prefix, facts)


def _compare_with_manifest(prefix: str | Path, facts: Report) -> list[str]:
    manifest = read_manifest(prefix)
    if manifest is None:
        return []
    for name in ("documents", "sequences", "tokens"):
        if name in manifest and manifest[name] != getattr(facts, name):
            raise DatasetError(
                f"{manifest_path(prefix)}: says {manifest[name]:,} {name}, "
                f"the dataset has {getattr(facts, name):,}"
            )
    for suffix, entry in manifest.get("files", {}).items():
        path = Path(f"{prefix}.{suffix}")
        if "sha256" in entry and sha256_file(path) != entry["sha256"]:
            raise DatasetError(
                f"{path}: its sha256 is not the manifest's: it was changed or damaged; make the dataset again"
            )
    return ["counts", "sha256"]


def _quantiles(lengths: np.ndarray) -> dict[str, float]:
    if not len(lengths):
        return {}
    names = {"min": 0, "p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100}
    values = np.percentile(lengths, list(names.values()), method="nearest")
    return {"mean": float(lengths.mean())} | {n: int(v) for n, v in zip(names, values.tolist(), strict=True)}


def samples(
    prefix: str | Path, index: Index, count: int, tokenizer: TokenizerLike | None, ids_shown: int = 64
) -> list[dict[str, Any]]:
    """The beginnings of ``count`` documents, spread evenly: number, tokens, ids, and text if decoded."""
    ids = map_tokens(prefix, index)
    ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[index.documents]
    documents = len(ends) - 1
    chosen = np.unique(np.linspace(0, documents - 1, min(count, documents)).astype(int)) if documents else []
    shown = []
    for number in map(int, chosen):
        begin, end = int(ends[number]), int(ends[number + 1])
        beginning = ids[begin : min(end, begin + ids_shown)].tolist()
        sample = {"document": number, "tokens": end - begin, "ids": beginning}
        if tokenizer is not None:
            sample["text"] = tokenizer.detokenize(beginning)
        shown.append(sample)
    return shown
