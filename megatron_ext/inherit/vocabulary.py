"""Maps each piece of the target's vocabulary to rows of the source's."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_ext.tokenizer.build import Tokenizer
from megatron_ext.tokenizer.pieces import pieces, unknown_id


@dataclass(frozen=True)
class Rows:
    """For each target id i, the source ids whose mean it starts from: ``ids[starts[i]:starts[i + 1]]``."""

    ids: np.ndarray  # int64, all lists one after the other
    starts: np.ndarray  # int64 [target vocabulary + 1]

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "Rows":
        """Rows from a list of source ids for each target id."""
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


class Piece(NamedTuple):
    """The spelling of an id, and the bytes that it represents, none for a special piece."""

    name: str
    text: bytes


def match(
    target: Sequence[Piece],
    source: Sequence[Piece],
    roles: dict[int, int],
    encode: Callable[[Piece], list[int]],
) -> Rows:
    """Match pieces by the bytes that they represent, and special pieces by their name.

    Among source pieces with the same bytes, the one with the same name is preferred, and byte pieces (as in
    byte fallback) come last, because text is encoded with the others.

    Args:
        target, source: pieces by id.
        roles: target id -> source id of special pieces, whose spelling may differ.
        encode: piece -> ids of the source tokenizer for its text, for pieces that the source lacks.

    Raises:
        ValueError: the source has nothing to represent a piece.
    """
    same = {piece: i for i, piece in enumerate(source)}
    by_text = _by_text(source)
    named = {piece.name: i for i, piece in enumerate(source)}
    special = {piece.name: i for i, piece in enumerate(source) if not piece.text}
    lists = []
    for i, piece in enumerate(target):
        source_id = roles.get(i, same.get(piece, by_text.get(piece.text, special.get(piece.name))))
        if source_id is None and not piece.text:
            source_id = named.get(piece.name)
        ids = encode(piece) if source_id is None else [source_id]
        if not ids:
            raise ValueError(f"the target tokenizer's piece {i} ({piece.name!r}) has no text and no source")
        lists.append(ids)
    return Rows.of(lists)


def _by_text(source: Sequence[Piece]) -> dict[bytes, int]:
    """Bytes -> id; byte pieces only if there is no other piece for the byte."""
    byte_last = sorted(
        enumerate(source), key=lambda each: each[1].name == f"<0x{each[1].text.hex().upper()}>"
    )
    ids: dict[bytes, int] = {}
    for i, piece in byte_last:
        if piece.text:
            ids.setdefault(piece.text, i)
    return ids


def match_tokenizers(target: Tokenizer, source: Tokenizer) -> Rows:
    """Rows of the target tokenizer's ids in the source tokenizer's vocabulary."""
    roles = {
        getattr(target, role): getattr(source, role)
        for role in ("bos", "eos", "pad", "eod")
        if getattr(target, role) >= 0 and getattr(source, role) >= 0
    }
    if unknown_id(target) >= 0 and unknown_id(source) >= 0:
        roles.setdefault(unknown_id(target), unknown_id(source))
    mine, theirs = (list(map(Piece, pieces(each), each.token_texts())) for each in (target, source))
    by_text = _by_text(theirs)
    return match(mine, theirs, roles, lambda piece: encode_piece(piece, source, by_text))


def encode_piece(piece: Piece, source: Tokenizer, by_text: dict[bytes, int]) -> list[int]:
    """Encode a piece's bytes as part of a longer text; a special piece is encoded as the text of its name.

    Bytes that are not whole characters, as in a piece that ends within one, become byte pieces.
    """
    text = (piece.text or piece.name.encode()).decode("utf-8", errors="surrogateescape")
    ids = []
    for part in re.findall("[\udc80-\udcff]+|[^\udc80-\udcff]+", text):
        if part[0] < "\udc80" or part[0] > "\udcff":
            ids += _encode_inside(part, source)
            continue
        for byte in part.encode("utf-8", errors="surrogateescape"):
            if (source_id := by_text.get(bytes([byte]))) is None:
                raise ValueError(
                    f"the source tokenizer has nothing for byte {byte:#04x} of piece {piece.name!r}"
                )
            ids.append(source_id)
    return ids


def _encode_inside(text: str, source: Tokenizer) -> list[int]:
    """Encode a text as part of a longer one, without the dummy prefix."""
    before = source.tokenize("\n")
    together = source.tokenize("\n" + text)
    if together[: len(before)] == before:
        return together[len(before) :]
    return source.tokenize(text)
