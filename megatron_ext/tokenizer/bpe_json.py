"""Hugging Face's ``tokenizer.json`` with a BPE model: what it says, and the same for a part of its pieces.

Read are byte-level models (GPT-2, Llama 3, Qwen, OLMo 2, SmolLM) and models with byte fallback (Llama 2,
Mistral). The text between added tokens is normalized and cut into pre-tokens, and each is merged by itself:
always the adjacent pair whose merge is listed first, of equal ones the leftmost. Hence a piece comes about
anywhere if and only if merging its own characters gives it, and its last merge is always the same pair;
other merges that would give it are never done. With ``ignore_merges`` a pre-token that is a piece is taken
whole, so there are pieces that come about in this way alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from megatron_ext.common.errors import first_line
from megatron_ext.tokenizer.bits_per_byte import (
    BYTE_LEVEL_ALPHABET,
    byte_fallback_text,
    byte_level_text,
)
from megatron_ext.tokenizer.build import NO_MODEL, describes_a_model
from megatron_ext.tokenizer.compress import CompressionError

Pair = tuple[str, str]
NEVER = 1 << 60
S = TypeVar("S", str, bytes)
#: Settings of a BPE model that change how text is cut, each with the values that do not.
_PLAIN = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}


@dataclass(frozen=True)
class BpeJson:
    """A ``tokenizer.json`` with a BPE model.

    Attributes:
        content: all that the file says.
        vocab: piece of the model -> id; some added tokens are among them.
        added: id -> added token, as the file describes it.
        ranks: pair -> place in the list of merges.
        byte_level: whether pieces are spelled in GPT-2's alphabet of bytes; otherwise bytes are a fallback.
    """

    content: dict[str, Any]
    vocab: dict[str, int]
    added: dict[int, dict[str, Any]]
    ranks: dict[Pair, int]
    byte_level: bool

    @functools.cached_property
    def pieces(self) -> list[str]:
        """Every piece and added token, by id."""
        named = self.vocab | {token["content"]: i for i, token in self.added.items()}
        return sorted(named, key=named.__getitem__)

    @functools.cached_property
    def derivations(self) -> dict[str, tuple[list[str], Pair | None]]:
        """Of each piece of the model what merging its characters ends with, and the pair merged last."""
        ranks = self.ranks
        return {
            piece: merge(list(piece), lambda left, right: ranks.get((left, right), NEVER))
            for piece in self.vocab
        }

    @property
    def ignore_merges(self) -> bool:
        """Whether a pre-token that is a piece is taken whole."""
        return bool(self.content["model"].get("ignore_merges"))

    def text(self, i: int, piece: str) -> bytes:
        """The bytes that an id stands for; b"" for special tokens."""
        if i in self.added:
            return b"" if self.added[i].get("special") else piece.encode()
        return byte_level_text(piece) if self.byte_level else byte_fallback_text(piece)

    def bytes_of(self, piece: str) -> tuple[int, ...]:
        """Ids of the bytes of a character, where bytes are a fallback."""
        return tuple(self.vocab[f"<0x{byte:02X}>"] for byte in piece.encode())

    def is_byte(self, piece: str) -> bool:
        """Whether a piece is one byte."""
        if self.byte_level:
            return piece in BYTE_LEVEL_ALPHABET
        return len(piece) > 1 and len(byte_fallback_text(piece)) == 1

    def part(self, new_id: dict[int, int], merges: list[Pair], added: Iterable[int]) -> dict[str, Any]:
        """The description of a part.

        Args:
            new_id: old id -> new id of the pieces that stay.
            merges: those that stay, in their order.
            added: old ids of the added tokens that stay added tokens.
        """
        spelled = self.content["model"]["merges"]
        joined = bool(spelled) and isinstance(spelled[0], str)
        model = self.content["model"] | {
            "vocab": {piece: new_id[i] for piece, i in self.vocab.items() if i in new_id},
            "merges": [" ".join(pair) if joined else list(pair) for pair in merges],
        }
        tokens = [self.added[i] | {"id": new_id[i]} for i in sorted(added)]
        changed = {"model": model, "added_tokens": tokens}
        for name in ("post_processor", "padding"):
            if self.content.get(name):
                changed[name] = _renumbered(self.content[name], new_id)
        return self.content | changed

    def ids_in_use(self) -> set[int]:
        """Ids that are put around or behind a text."""
        found: set[int] = set()
        for name in ("post_processor", "padding"):
            _renumbered(self.content.get(name), _Noting(found))
        return found


def merge(symbols: list[S], rank: Callable[[S, S], int]) -> tuple[list[S], tuple[S, S] | None]:
    """Merges the adjacent pair of the lowest rank, of equal ones the leftmost, until all ranks are ``NEVER``.

    Returns:
        The symbols left, and the pair that was merged last.
    """
    last = None
    found = [rank(left, right) for left, right in pairwise(symbols)]
    while found and (best := min(found)) < NEVER:
        at = found.index(best)
        last = symbols[at], symbols[at + 1]
        symbols[at : at + 2] = [last[0] + last[1]]
        del found[at]
        if at < len(found):
            found[at] = rank(symbols[at], symbols[at + 1])
        if at:
            found[at - 1] = rank(symbols[at - 1], symbols[at])
    return symbols, last


class _Noting(dict[int, int]):
    """A map of ids to themselves that notes what it was asked for."""

    def __init__(self, asked: set[int]) -> None:
        super().__init__()
        self.asked = asked

    def __missing__(self, i: int) -> int:
        self.asked.add(i)
        return i


def _renumbered(part: Any, new_id: dict[int, int]) -> Any:
    """A post-processor or the padding of ``tokenizer.json`` with other ids."""
    if isinstance(part, list):
        return [_renumbered(each, new_id) for each in part]
    if not isinstance(part, dict):
        return part
    changed: dict[str, Any] = {}
    for name, value in part.items():
        if name == "ids" and isinstance(value, list):  # TemplateProcessing
            changed[name] = [new_id[i] for i in value]
        elif name == "pad_id":
            changed[name] = new_id[value]
        elif name in ("sep", "cls") and isinstance(value, list):  # BertProcessing, RobertaProcessing
            changed[name] = [value[0], new_id[value[1]]]
        else:
            changed[name] = _renumbered(value, new_id)
    return changed


def read(data: bytes, name: str) -> BpeJson:
    """Parses a file called ``name``.

    Raises:
        CompressionError: it is no ``tokenizer.json``, of a kind that cannot be compressed, or contradicts
            itself.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CompressionError(f"{name}: not JSON, or cut short ({error})") from error
    try:
        return _checked(content)
    except CompressionError as error:
        raise CompressionError(f"{name}: {error}") from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CompressionError(f"{name}: not a tokenizer.json ({first_line(error)})") from error


def _checked(content: dict[str, Any]) -> BpeJson:
    if not describes_a_model(content):
        raise CompressionError(NO_MODEL)
    model = content["model"]
    kind = model.get("type", "BPE" if "merges" in model else "of no type")
    if kind != "BPE":
        raise CompressionError(f"its model is {kind}; only BPE can be compressed")
    for setting, plain in _PLAIN.items():
        if model.get(setting) not in plain:
            raise CompressionError(f"{setting} {model[setting]!r} is not supported")
    byte_level = _has_byte_level(content.get("pre_tokenizer")) or _has_byte_level(content.get("normalizer"))
    vocab = dict(model["vocab"])
    if not byte_level:
        _require_byte_fallback(model, vocab)
    added = _added(content, vocab)
    _require_dense(vocab, added)
    return BpeJson(content, vocab, added, _ranks(model["merges"], vocab), byte_level)


def _has_byte_level(part: Any) -> bool:
    """Whether a normalizer or pre-tokenizer, or one in a sequence of them, is ByteLevel."""
    if isinstance(part, list):
        return any(map(_has_byte_level, part))
    if not isinstance(part, dict):
        return False
    inner = part.get("pretokenizers") or part.get("normalizers") or []
    return part.get("type") == "ByteLevel" or _has_byte_level(inner)


def _require_byte_fallback(model: dict[str, Any], vocab: dict[str, int]) -> None:
    if not model.get("byte_fallback"):
        raise CompressionError("its BPE model is neither byte-level nor has it byte fallback")
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]:
        raise CompressionError(f"byte fallback without a piece <0x{missing[0]:02X}>")
    if model.get("ignore_merges"):
        raise CompressionError("byte fallback together with ignore_merges is not supported")


def _added(content: dict[str, Any], vocab: dict[str, int]) -> dict[int, dict[str, Any]]:
    """id -> added token."""
    piece_of = {i: piece for piece, i in vocab.items()}
    added: dict[int, dict[str, Any]] = {}
    texts: set[str] = set()
    for token in content.get("added_tokens") or []:
        text, i = token["content"], token["id"]
        if text in vocab and vocab[text] != i:
            raise CompressionError(f"added token {text!r} has id {i}, but as a piece {vocab[text]}")
        if i in piece_of and piece_of[i] != text:
            raise CompressionError(
                f"added token {text!r} has id {i}, which is that of piece {piece_of[i]!r}: "
                "one id with two meanings"
            )
        if i in added:
            raise CompressionError(f"added tokens {added[i]['content']!r} and {text!r} both have id {i}")
        if text in texts:
            raise CompressionError(f"added token {text!r} is there twice")
        texts.add(text)
        added[i] = token
    return added


def _require_dense(vocab: dict[str, int], added: dict[int, dict[str, Any]]) -> None:
    ids = list(vocab.values())
    if not all(isinstance(piece, str) and type(i) is int for piece, i in vocab.items()):
        raise CompressionError("its vocabulary does not give each piece a number")
    if len(set(ids)) < len(ids):
        twice = next(i for i, after in pairwise(sorted(ids)) if i == after)
        raise CompressionError(f"two pieces have id {twice}")
    present = set(ids) | added.keys()
    if (hole := next((i for i in range(len(present)) if i not in present), -1)) >= 0:
        raise CompressionError(f"id {hole} has no piece: a vocabulary with holes cannot be compressed")


def _ranks(merges: list[Any], vocab: dict[str, int]) -> dict[Pair, int]:
    ranks = {}
    for rank, pair in enumerate(_pairs(merges)):
        for piece in (*pair, "".join(pair)):
            if piece not in vocab:
                raise CompressionError(f"merge {rank} {' '.join(pair)!r} names {piece!r}, which is no piece")
        ranks[pair] = rank  # of a pair that is listed twice the last counts, as in tokenizers
    return ranks


def _pairs(merges: list[Any]) -> Iterator[Pair]:
    for rank, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise CompressionError(f"merge {rank} {merge!r} is no pair of pieces")
        yield parts[0], parts[1]
