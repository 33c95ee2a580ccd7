"""Which rows of the source's vocabulary each piece of the target's starts from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ext.tokenizer.bits_per_byte import SPACE
from megatron_ext.tokenizer.build import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer


@dataclass(frozen=True)
class Rows:
    """For each target id the source ids whose mean it starts from: ``ids[starts[i]:starts[i + 1]]``."""

    ids: np.ndarray  # int64, all lists one after the other
    starts: np.ndarray  # int64 [target vocabulary + 1]

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "Rows":
        """From a list of source ids for each target id."""
        starts = np.cumsum([0] + [len(ids) for ids in lists], dtype=np.int64)
        return cls(np.array([i for ids in lists for i in ids], dtype=np.int64), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> np.ndarray:
        """Number of source rows for each target id."""
        return np.diff(self.starts)

    def take(self, weights: Tensor) -> Tensor:
        """[source vocabulary, h] -> [target vocabulary, h]; a single row is copied bit for bit."""
        out = weights.new_zeros(len(self), weights.size(1))
        first = torch.from_numpy(self.ids[self.starts[:-1]])
        out[:] = weights[first]
        for i in np.flatnonzero(self.counts > 1):
            ids = torch.from_numpy(self.ids[self.starts[i] : self.starts[i + 1]])
            out[i] = weights[ids].float().mean(0)
        return out


def match(
    target: Sequence[str], source: Sequence[str], roles: dict[int, int], encode: Callable[[str], list[int]]
) -> Rows:
    """Rows by piece string.

    Args:
        target, source: pieces by id.
        roles: target id -> source id of special pieces, which may be spelled differently.
        encode: piece -> ids of the source tokenizer for its text, for pieces that the source lacks.

    Raises:
        ValueError: nothing stands for a piece in the source.
    """
    known = {piece: i for i, piece in enumerate(source)}
    lists = []
    for i, piece in enumerate(target):
        found = roles.get(i, known.get(piece))
        ids = encode(piece) if found is None else [found]
        if not ids:
            raise ValueError(f"the target tokenizer's piece {i} ({piece!r}) has no text and no source")
        lists.append(ids)
    return Rows.of(lists)


def match_tokenizers(target: Tokenizer, source: Tokenizer) -> Rows:
    """Rows of the target tokenizer's ids in the source tokenizer's vocabulary."""
    roles = {
        getattr(target, role): getattr(source, role)
        for role in ("bos", "eos", "pad", "eod")
        if getattr(target, role) >= 0 and getattr(source, role) >= 0
    }
    both = (target, source)
    if all(isinstance(tokenizer, SentencePieceTokenizer) for tokenizer in both):
        roles[target.processor.unk_id()] = source.processor.unk_id()
    return match(pieces(target), pieces(source), roles, lambda piece: encode_piece(piece, source))


def pieces(tokenizer: Tokenizer) -> list[str]:
    """The spelling of every id.

    Raises:
        ValueError: the tokenizer has no pieces (NullTokenizer).
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [tokenizer.processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        spelled = tokenizer.tokenizer.convert_ids_to_tokens(list(range(tokenizer.vocab_size)))
        return [f"<unused {i}>" if piece is None else piece for i, piece in enumerate(spelled)]
    raise ValueError(f"{type(tokenizer).__name__} has no pieces to match")


def encode_piece(piece: str, source: Tokenizer) -> list[int]:
    """Ids of a piece's text inside a longer text: no dummy blank is put in front of it."""
    text = piece.replace(SPACE, " ")
    before = source.tokenize("\n")
    together = source.tokenize("\n" + text)
    if together[: len(before)] == before:
        return together[len(before) :]
    return source.tokenize(text)
