"""A smaller vocabulary out of a SentencePiece model: which pieces stay, and the new model.

PanGu-pi Pro (arXiv 2402.02791, section 3) keeps the most frequent pieces of a tokenised corpus and deletes
the others. In a BPE model that leaves dead pieces: one whose merge parents were deleted can never be produced
again. Here a BPE vocabulary shrinks from its leaves: only a piece that is no part of another's last merge may
go, and of those always the one that lengthens the counted text least. Every piece left can be produced.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megatron_ext.tokenizer.encoder import NativeEncoder

Piece = ModelProto.SentencePiece
BPE, UNIGRAM = 2, 1
FILLER = re.compile(r"[<\[].*(unused|reserved|filler|placeholder|blank).*\d+.*[>\]]", re.IGNORECASE)


class CompressionError(ValueError):
    """The vocabulary cannot be made as asked."""


@dataclass
class Vocabulary:
    """What the choice of pieces looks at.

    Attributes:
        texts: of the pieces.
        types: int [vocabulary], ``Piece.Type`` values.
        parents: int32 [vocabulary, 2], the pieces that a piece's last merge joins, -1 for none.
        fixed: bool [vocabulary], pieces that always stay.
        dead: bool [vocabulary], normal pieces that no text can produce.
        byte_fallback: whether a dropped character becomes bytes.
    """

    texts: list[str]
    types: np.ndarray
    parents: np.ndarray
    fixed: np.ndarray
    dead: np.ndarray
    byte_fallback: bool


def read_proto(data: bytes) -> ModelProto:
    """Parses a model file.

    Raises:
        CompressionError: it is not a SentencePiece model, or neither BPE nor unigram.
    """
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:
        raise CompressionError(f"not a SentencePiece model: {error}") from error
    if proto.trainer_spec.model_type not in (BPE, UNIGRAM):
        raise CompressionError("only BPE and unigram models can be compressed")
    return proto


def describe(proto: ModelProto, encoder: NativeEncoder, drop_fillers: bool, counts: np.ndarray) -> Vocabulary:
    """The vocabulary of a model; fillers that never occur are not fixed if ``drop_fillers``."""
    texts = [piece.piece for piece in proto.pieces]
    types = np.array([piece.type for piece in proto.pieces])
    fixed = types != Piece.NORMAL
    if drop_fillers:
        for i in np.flatnonzero((types == Piece.USER_DEFINED) & (counts == 0)):
            fixed[i] = not FILLER.fullmatch(texts[i])
    # An unused piece can never come out, a piece with a NUL is unused for sentencepiece.
    fixed &= types != Piece.UNUSED
    dead = (types == Piece.UNUSED) | np.array(["\0" in text for text in texts])
    parents = np.full((len(texts), 2), -1, dtype=np.int32)
    if proto.trainer_spec.model_type == BPE:
        derivations = encoder.derivations()
        dead |= derivations[:, 0] == -2
        parents = np.where(derivations < 0, -1, derivations)
    return Vocabulary(texts, types, parents, fixed, dead, proto.trainer_spec.byte_fallback)


def removal_order(vocabulary: Vocabulary, counts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces in the order in which they go, each with the tokens that its going adds to each group.

    Dead pieces and dropped fillers go first. Then always the cheapest leaf: a piece of several characters
    leaves two tokens for one, a character its UTF-8 bytes. The parts of a piece that goes inherit its count.
    Without byte fallback characters stay.

    Args:
        counts: int64 [groups, vocabulary]; not changed.
    """
    counts = counts.T.copy()  # a row a piece
    gone = (vocabulary.dead | ~vocabulary.fixed & (vocabulary.types != Piece.NORMAL)) & ~vocabulary.fixed
    nothing = np.zeros(counts.shape[1], dtype=np.int64)
    for i in np.flatnonzero(gone):
        yield int(i), nothing
    movable = ~gone & ~vocabulary.fixed
    parents = vocabulary.parents
    uses = np.bincount(parents[movable & (parents.max(axis=1) >= 0)].ravel() + 1, minlength=len(movable) + 1)[
        1:
    ]
    growth = np.array([_growth(text) for text in vocabulary.texts])
    if not vocabulary.byte_fallback:
        movable &= np.array([len(text) > 1 for text in vocabulary.texts])
    totals = counts.sum(axis=1).tolist()
    uses = uses.tolist()
    heap = [(totals[i] * int(growth[i]), int(i)) for i in np.flatnonzero(movable) if uses[i] == 0]
    heapq.heapify(heap)
    while heap:
        cost, i = heapq.heappop(heap)
        if cost != totals[i] * int(growth[i]):
            heapq.heappush(heap, (totals[i] * int(growth[i]), i))
            continue
        yield i, counts[i] * growth[i]
        for part in parents[i].tolist():
            if part < 0:
                continue
            counts[part] += counts[i]
            totals[part] += totals[i]
            uses[part] -= 1
            if uses[part] == 0 and movable[part]:
                heapq.heappush(heap, (totals[part] * int(growth[part]), part))


def _growth(text: str) -> int:
    """Tokens that the removal of a piece adds where it occurred."""
    return 1 if len(text) > 1 else max(1, len(text.encode()) - 1)


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
            raise CompressionError(f"fewer than {vocab_size} pieces can be produced; ask for fewer")
        kept[i] = False
        left -= 1
    if left > vocab_size:
        raise CompressionError(
            f"{left} pieces must stay (bytes, control, user-defined, needed characters), "
            f"more than the {vocab_size} asked for; raise --vocab-size or try --drop-fillers"
        )
    return np.flatnonzero(kept)


def choose_unigram(vocabulary: Vocabulary, counts: np.ndarray, vocab_size: int) -> np.ndarray:
    """The most frequent pieces of a unigram model, where no piece needs another; characters stay.

    Raises:
        CompressionError: as for ``choose``.
    """
    size = len(vocabulary.texts)
    must = vocabulary.fixed | np.array([len(t) == 1 for t in vocabulary.texts]) & ~vocabulary.dead
    if not must.sum() <= vocab_size <= size:
        raise CompressionError(f"--vocab-size must be between {int(must.sum())} and {size} for this model")
    order = np.lexsort((np.arange(size), -counts.sum(axis=0), vocabulary.dead, ~must))
    return np.sort(order[:vocab_size])


def unigram_scores(proto: ModelProto, counts: np.ndarray, kept: np.ndarray) -> dict[int, float]:
    """Log-probabilities of the normal pieces kept, from their counts (add one half), by old id.

    The counts are those of the full model's segmentation: one step of the EM algorithm that unigram models
    are trained with, from the full model as its start.
    """
    normal = [int(i) for i in kept if proto.pieces[int(i)].type == Piece.NORMAL]
    weights = counts.sum(axis=0)[normal] + 0.5
    return dict(zip(normal, np.log(weights / weights.sum()).tolist(), strict=True))


def pruned_model(proto: ModelProto, kept: np.ndarray, scores: dict[int, float] | None = None) -> ModelProto:
    """The model with the pieces ``kept`` only, in their order; ``scores`` by old id replaces theirs."""
    new = ModelProto()
    new.CopyFrom(proto)
    del new.pieces[:]
    for i in kept.tolist():
        piece = new.pieces.add()
        piece.CopyFrom(proto.pieces[i])
        if scores and i in scores:
            piece.score = scores[i]
    new.trainer_spec.vocab_size = len(kept)
    new_id = {old: new_id for new_id, old in enumerate(kept.tolist())}
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        old = getattr(proto.trainer_spec, name)
        if old >= 0:
            setattr(new.trainer_spec, name, new_id.get(old, -1))
    new.DiscardUnknownFields()  # self-test data, which this schema lacks: segmentations of the full model
    return new


def unreachable(encoder: NativeEncoder) -> list[str]:
    """Normal pieces of a BPE model that no text can produce."""
    dead = np.flatnonzero(encoder.derivations()[:, 0] == -2)
    return [encoder.processor.id_to_piece(int(i)) for i in dead]
