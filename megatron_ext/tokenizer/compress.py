"""A smaller vocabulary: which pieces of a tokenizer stay.

PanGu-pi Pro (arXiv 2402.02791, section 3) keeps the most frequent pieces of a tokenised corpus and deletes
the others. In a BPE model that leaves dead pieces: one whose merge parents were deleted can never be produced
again. Here a BPE vocabulary shrinks from its leaves: only a piece that is no part of another's last merge may
go, and of those always the one that lengthens the counted text least. Every piece left can be produced.

What a kind of tokenizer does with the choice: :mod:`compress_sentencepiece`, :mod:`compress_huggingface`.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

FILLER = re.compile(r"[<\[].*(unused|reserved|filler|placeholder|blank).*\d+.*[>\]]", re.IGNORECASE)


class CompressionError(ValueError):
    """The vocabulary cannot be made as asked."""


@dataclass
class Vocabulary:
    """What the choice of pieces looks at.

    Attributes:
        texts: of the pieces, as reports show them.
        parts: of each piece the ids that take its place once it is gone: the two that its last merge joins,
            the bytes of a character; () where nothing does, or nothing is known of it.
        fixed: bool [vocabulary], pieces that always stay.
        dead: bool [vocabulary], pieces that no text can produce.
        fillers: bool [vocabulary], pieces that shall go.
    """

    texts: list[str]
    parts: list[tuple[int, ...]]
    fixed: np.ndarray
    dead: np.ndarray
    fillers: np.ndarray


class TextEncoder(Protocol):
    """Text to ids, as far as compression needs it; texts are UTF-8."""

    vocab_size: int

    def add_histogram(self, texts: Sequence[bytes], histogram: np.ndarray) -> None:
        """Adds to ``histogram``, int64 [vocab_size], how often each id occurs in the texts."""
        ...


class Compressible(Protocol):
    """A tokenizer of any kind that can be compressed."""

    @property
    def encoder(self) -> TextEncoder:
        """Its own ids, fast."""
        ...

    @property
    def sha256(self) -> str:
        """Of the files that decide the ids."""
        ...

    def token_bytes(self) -> np.ndarray:
        """How many bytes each id stands for, int32 [vocabulary]."""
        ...

    def vocabulary(self, counts: np.ndarray) -> Vocabulary:
        """What is to be chosen from; ``counts``, int64 [vocabulary], say which fillers are used."""
        ...

    def choose(self, vocabulary: Vocabulary, counts: np.ndarray, vocab_size: int) -> np.ndarray:
        """Ids of exactly ``vocab_size`` pieces that stay, ascending; ``counts`` [groups, vocabulary]."""
        ...

    def compressed(self, kept: np.ndarray, counts: np.ndarray) -> Compressible:
        """The tokenizer of the pieces ``kept``, in their order."""
        ...

    def unreachable(self) -> list[str]:
        """Pieces that are not fixed and that no text can produce, found with the tokenizer's own library."""
        ...

    def round_trip(self, texts: list[str]) -> tuple[int, int]:
        """Tokens of the texts, and the number of texts that do not come back exactly."""
        ...

    def refuse_others(self, output: str) -> None:
        """Raises CompressionError if OUTPUT_hf/ holds files of another tokenizer, which would be read too."""
        ...

    def write(self, output: str) -> dict[str, Any]:
        """Writes OUTPUT's files; what the summary shall say of them."""
        ...


def removal_order(vocabulary: Vocabulary, counts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces in the order in which they go, each with the tokens that its going adds to each group.

    Dead pieces and fillers go first. Then always the cheapest leaf, a piece that is no part of another: each
    of its occurrences becomes its parts, which inherit its count. Of equal ones the last goes, for the order
    of pieces is that of the text that the tokenizer was trained on.

    Args:
        counts: int64 [groups, vocabulary]; not changed.
    """
    counts = counts.T.copy()  # a row a piece
    dead = vocabulary.dead & ~vocabulary.fixed
    gone = dead | vocabulary.fillers & ~vocabulary.fixed
    nothing = np.zeros(counts.shape[1], dtype=np.int64)
    for i in (*np.flatnonzero(dead), *np.flatnonzero(gone & ~dead)):
        yield int(i), nothing
    parts, movable = vocabulary.parts, (~gone & ~vocabulary.fixed).tolist()
    growth = [max(1, len(of_piece) - 1) for of_piece in parts]
    uses = [0] * len(parts)
    for i in np.flatnonzero(~gone):
        for part in parts[i]:
            uses[part] += 1
    totals = counts.sum(axis=1).tolist()
    heap = [(totals[i] * growth[i], -i) for i in range(len(parts)) if movable[i] and uses[i] == 0]
    heapq.heapify(heap)
    while heap:
        cost, i = heapq.heappop(heap)
        i = -i
        if cost != totals[i] * growth[i]:
            heapq.heappush(heap, (totals[i] * growth[i], -i))
            continue
        yield i, counts[i] * growth[i]
        for part in parts[i]:
            counts[part] += counts[i]
            totals[part] += totals[i]
            uses[part] -= 1
            if uses[part] == 0 and movable[part]:
                heapq.heappush(heap, (totals[part] * growth[part], -part))


def choose(vocabulary: Vocabulary, counts: np.ndarray, vocab_size: int) -> np.ndarray:
    """Ids of exactly ``vocab_size`` pieces that stay, ascending, int64.

    Raises:
        CompressionError: the vocabulary is not larger, or the pieces that must stay do not fit.
    """
    size = len(vocabulary.texts)
    if vocab_size > size:
        raise CompressionError(f"the model has {size} pieces, fewer than the {vocab_size} asked for")
    kept = np.ones(size, dtype=bool)
    left = size
    for i, _ in removal_order(vocabulary, counts):
        if left == vocab_size and not vocabulary.dead[i]:
            break
        if left == vocab_size:
            alive = size - int(vocabulary.dead.sum())
            raise CompressionError(
                f"only {alive} of {size} pieces can be produced; --vocab-size must be {alive} or less"
            )
        kept[i] = False
        left -= 1
    if left > vocab_size:
        raise CompressionError(
            f"{left} pieces must stay (bytes, special and added tokens, needed characters), more than the "
            f"{vocab_size} asked for; raise --vocab-size to {left} or more, or drop fillers (--drop-fillers)"
        )
    return np.flatnonzero(kept)


def most_frequent(vocabulary: Vocabulary, counts: np.ndarray, vocab_size: int) -> np.ndarray:
    """The pieces that must stay and the most frequent others, whether or not these can be produced."""
    fixed, others = np.flatnonzero(vocabulary.fixed), np.flatnonzero(~vocabulary.fixed)
    order = others[np.argsort(-counts.sum(axis=0)[others], kind="stable")]
    return np.sort(np.concatenate([fixed, order[: vocab_size - len(fixed)]]))
