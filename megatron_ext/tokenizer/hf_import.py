"""A ``tokenizer.json`` in SentencePiece's manner (Llama 2, Mistral) -> a SentencePiece model of the same ids.

Such a file lists merges of characters, with byte fallback, where SentencePiece has scores of pieces. A piece
scores by its first merge. The ids are the same if the merges that can happen, which the native encoder's
derivations tell, are in the order of those scores: of the pairs that can be merged, both take the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from megatron_ext.tokenizer.encoder import NativeEncoder

_SPACE = "▁"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
#: What of a BPE model must be as it is by default.
_PLAIN = {
    "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False,
}  # fmt: skip
Piece = ModelProto.SentencePiece


class OtherManner(ValueError):
    """The tokenizer does what no SentencePiece model does, or is not known to; the message says what."""


@dataclass(frozen=True)
class Imported:
    """The native encoder of a ``tokenizer.json``.

    Attributes:
        encoder: gives its ids for texts without any of ``apart``, or of ``apart_in_front`` in front.
        apart: texts that have a meaning of their own in it, such as ``</s>``.
        apart_in_front: what keeps it from putting a blank in front.
    """

    encoder: NativeEncoder
    apart: tuple[bytes, ...]
    apart_in_front: tuple[bytes, ...]

    def takes(self, text: bytes) -> bool:
        """Whether the encoder gives the ids of a text."""
        return not (text.startswith(self.apart_in_front) or any(word in text for word in self.apart))


def sentencepiece_of(description: str) -> Imported:
    """The native encoder of what a ``tokenizer.json`` holds.

    Raises:
        OtherManner: there is none, or the compiled encoder is missing.
    """
    content: dict[str, Any] = json.loads(description)
    model, added = content["model"], content["added_tokens"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise OtherManner("no BPE model with byte fallback")
    if changed := [name for name, value in _PLAIN.items() if model.get(name, value) != value]:
        raise OtherManner(f"{changed[0]} is set")
    prefix, in_front = _blanks(content["normalizer"], content["pre_tokenizer"])
    apart = [token["content"] for token in added]
    if any(token["normalized"] and _has_blank(token["content"]) for token in added):
        raise OtherManner("an added token with a blank is looked for in the normalized text")
    if any("\0" in piece for piece in model["vocab"]):
        apart.append("\0")  # which SentencePiece finds in no text
    ranks = _ranks(model["merges"])
    encoder = NativeEncoder(model_proto=_proto(model, ranks, prefix).SerializeToString())
    if not encoder.native:
        raise OtherManner(f"the native encoder does not read it ({encoder.fallback_reason})")
    _require_same_order(encoder, ranks)
    return Imported(encoder, tuple(word.encode() for word in apart), in_front)


def _has_blank(text: str) -> bool:
    return " " in text or _SPACE in text


def _blanks(
    normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None
) -> tuple[bool, tuple[bytes, ...]]:
    """Whether a blank comes in front of a text, and with which beginnings none does."""
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if pre_tokenizer is None and steps in ([_REPLACE], [_PREPEND, _REPLACE]):
        return _PREPEND in steps, ()
    if steps == [None] and pre_tokenizer and pre_tokenizer["type"] == "Metaspace":
        scheme = pre_tokenizer.get("prepend_scheme", "always")
        if pre_tokenizer["replacement"] == _SPACE and pre_tokenizer.get("split", True) is False:
            return scheme != "never", () if scheme == "never" else (b" ", _SPACE.encode())
    raise OtherManner("its normalizer or pre-tokenizer does more than to spell blanks as ▁")


def _ranks(merges: list[Any]) -> dict[tuple[str, str], int]:
    """(left, right) -> rank; the first counts where a pair is listed twice."""
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault((left, right), rank)
    return ranks


def _lowest(ranks: dict[tuple[str, str], int]) -> dict[str, int]:
    """Piece -> the lowest rank of the merges that make it."""
    lowest: dict[str, int] = {}
    for (left, right), rank in ranks.items():
        lowest[left + right] = min(rank, lowest.get(left + right, rank))
    return lowest


def _proto(model: dict[str, Any], ranks: dict[tuple[str, str], int], prefix: bool) -> ModelProto:
    """Pieces score by the lowest rank of their merges; what no merge makes is never found in a text."""
    unknown, lowest = model.get("unk_token"), _lowest(ranks)
    pieces: dict[int, str] = {number: piece for piece, number in model["vocab"].items()}
    proto = ModelProto()
    for number in range(1 + max(pieces)):
        piece = pieces.get(number, f"<no piece {number}>")
        silent = Piece.UNKNOWN if piece == unknown else Piece.CONTROL
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        made = len(piece) == 1 or piece in lowest
        kind = Piece.BYTE if is_byte else Piece.NORMAL if made and piece != unknown else silent
        proto.pieces.add(piece=piece, score=-float(lowest.get(piece, 0)), type=kind)
    proto.trainer_spec.model_type = TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.trainer_spec.unk_piece = unknown or "<unk>"
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto


def _require_same_order(encoder: NativeEncoder, ranks: dict[tuple[str, str], int]) -> None:
    """Raise unless the merges that can happen come in the order of the scores, and make all that is made."""
    spelled, lowest = encoder.processor.id_to_piece, _lowest(ranks)
    made = set()
    for number, (left, right) in enumerate(encoder.derivations().tolist()):
        if left >= 0 and right >= 0:
            if (spelled(left), spelled(right)) not in ranks:
                raise OtherManner(f"no merge makes {spelled(number)!r} as SentencePiece would")
            made.add(spelled(number))
    before = -1
    for (left, right), _ in sorted(ranks.items(), key=lambda item: item[1]):
        # A run of one character grows from its left in both, whatever pairs of shorter runs are listed.
        is_run = len({*left, *right}) == 1
        if not is_run and all(len(part) == 1 or part in made for part in (left, right)):
            if lowest[left + right] < before:
                raise OtherManner(f"a merge of {left!r} and {right!r} comes behind those of later pieces")
            before = lowest[left + right]
