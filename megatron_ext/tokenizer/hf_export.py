"""A SentencePiece model as a Hugging Face tokenizer (``tokenizer.json``): exactly, or not at all.

The merges of a BPE model are those the native encoder derives: one for each producible piece, in the order of
the scores. What is to be written is read back by Hugging Face's own library and compared with sentencepiece
on texts made to show differences (:mod:`hf_check`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.hf_check import first_difference

if TYPE_CHECKING:
    import tokenizers

_SPACE = "▁"
_MOST_TIES = 1000
#: Of pieces of a unigram model that no text gives: no sum of scores is lower.
_NEVER = -1e6
#: Blanks that sentencepiece removes from the front of what it decodes, where it removes them all.
_ALL = 1000
Piece = ModelProto.SentencePiece


class NotExpressible(ValueError):
    """The model does something that ``tokenizer.json`` cannot say; the message says what."""


def folder_files(encoder: NativeEncoder, model_proto: bytes) -> dict[str, bytes]:
    """Name -> content of a tokenizer's folder: tokenizer.model, tokenizer.json and tokenizer_config.json.

    Raises:
        NotExpressible: transformers could not give the model's ids.
    """
    text = fast_tokenizer(encoder).to_str(pretty=True)
    processor = encoder.processor
    names = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    config: dict[str, Any] = {
        f"{name}_token": processor.id_to_piece(i) for name, i in names.items() if i >= 0
    }
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    described = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {
        "tokenizer.model": model_proto,
        "tokenizer.json": text.encode(),
        "tokenizer_config.json": described.encode(),
    }


def fast_tokenizer(encoder: NativeEncoder) -> tokenizers.Tokenizer:
    """The equivalent ``tokenizers.Tokenizer``.

    Raises:
        NotExpressible: there is none, or the package tokenizers is missing.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise NotExpressible("that needs the package tokenizers") from error
    proto = ModelProto.FromString(encoder.processor.serialized_model_proto())
    _require_plain(proto)
    tokenizer = tokenizers.Tokenizer(_model(encoder, proto))
    tokenizer.normalizer = _normalizer(proto)
    tokenizer.decoder = _decoder(proto)
    special = _texts(proto, Piece.CONTROL, Piece.UNKNOWN)
    tokenizer.add_special_tokens([tokenizers.AddedToken(piece, special=True) for piece in special])
    (_add_user_defined if encoder.native else _cut_silent_pieces)(tokenizer, proto)
    back = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    if difference := first_difference(encoder.processor, proto, back):
        raise NotExpressible(f"written as tokenizer.json it would encode otherwise: {difference}")
    return tokenizer


def _require_plain(proto: ModelProto) -> None:
    """Raise for what sentencepiece does to a text before it looks for pieces, and Hugging Face cannot."""
    problems = []
    if proto.normalizer_spec.precompiled_charsmap:
        problems.append(f"its normalizer ({proto.normalizer_spec.name or 'custom'}) replaces characters")
    if not proto.normalizer_spec.escape_whitespaces:
        problems.append("it leaves blanks as they are (escape_whitespaces)")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        problems.append("it puts blanks behind words (treat_whitespace_as_suffix)")
    if problems:
        raise NotExpressible("; ".join(problems))


def _model(encoder: NativeEncoder, proto: ModelProto) -> tokenizers.models.Model:
    from tokenizers.models import BPE, Unigram

    byte_fallback, unknown = any(p.type == Piece.BYTE for p in proto.pieces), encoder.processor.unk_id()
    if encoder.native:
        # sentencepiece gives no piece that holds NUL; Hugging Face would.
        names = [f"<unused {i}>" if "\0" in p.piece else p.piece for i, p in enumerate(proto.pieces)]
        vocabulary = {name: i for i, name in enumerate(names)}
        options = {"unk_token": proto.pieces[unknown].piece, "fuse_unk": True, "byte_fallback": byte_fallback}
        return BPE(vocabulary, merges_of(encoder, proto), **options)
    if proto.trainer_spec.model_type != TrainerSpec.UNIGRAM:
        raise NotExpressible(
            f"it is neither unigram nor a BPE model to be derived: {encoder.fallback_reason}"
        )
    return Unigram([(piece.piece, _score(piece, proto)) for piece in proto.pieces], unknown, byte_fallback)


def _score(piece: ModelProto.SentencePiece, proto: ModelProto) -> float:
    """The score that sentencepiece reckons with (``EncodeOptimized`` of its unigram_model.cc)."""
    if piece.type == Piece.USER_DEFINED:
        best = max((other.score for other in proto.pieces if other.type == Piece.NORMAL), default=0.0)
        return len(piece.piece.encode()) * best - 0.1
    return piece.score if piece.type == Piece.NORMAL else _NEVER


def merges_of(encoder: NativeEncoder, proto: ModelProto) -> list[tuple[str, str]]:
    """(left, right) of each producible piece's last merge, best score first.

    Raises:
        NotExpressible: merges of characters that are no pieces, or of equal scores that no order replaces.
    """
    processor, derivations = encoder.processor, encoder.derivations().tolist()
    for i, (left, right) in enumerate(derivations):
        merged = left >= 0 and right >= 0
        piece = proto.pieces[i]
        if piece.type == Piece.NORMAL and len(piece.piece) > 1 and left != -2 and not merged:
            raise NotExpressible(f"piece {piece.piece!r} joins characters that are no pieces")
    merged = [i for i, (left, right) in enumerate(derivations) if left >= 0 and right >= 0]
    merged.sort(key=lambda i: -processor.get_score(i))
    made = {tuple(derivations[i]): i for i in merged}
    groups = (list(group) for _, group in groupby(merged, key=processor.get_score))
    ordered = (i for group in groups for i in _leftmost_first(group, derivations, made, processor))
    return [tuple(processor.id_to_piece(part) for part in derivations[i]) for i in ordered]


def _leftmost_first(
    group: list[int],
    derivations: list[list[int]],
    made: dict[tuple[int, ...], int],
    processor: SentencePieceProcessor,
) -> Iterator[int]:
    """Merges of equal score in an order that, one by one, takes what sentencepiece takes: the leftmost.

    One that can stand to the left of another and share a piece with it, or with what comes of it, is first.
    """
    if len(group) == 1:
        return iter(group)
    if len(group) > _MOST_TIES:
        raise NotExpressible(f"{len(group)} pieces have the same score")

    def wins(pair: tuple[int, int], score: float) -> bool:
        return pair in made and processor.get_score(made[pair]) >= score

    order = TopologicalSorter({i: set() for i in group})
    score = processor.get_score(group[0])
    for a in group:
        for b in group:
            (_, right), (left, _) = derivations[a], derivations[b]
            if a != b and (right == left or wins((a, left), score) or wins((right, b), score)):
                order.add(b, a)
    try:
        return iter(list(order.static_order()))
    except CycleError as error:
        pieces = [processor.id_to_piece(i) for i in error.args[1]]
        raise NotExpressible(f"pieces of the same score take from each other: {pieces}") from error


def _normalizer(proto: ModelProto) -> tokenizers.normalizers.Normalizer:
    """What sentencepiece does to blanks: superfluous ones go, one comes in front, all become U+2581."""
    from tokenizers import Regex
    from tokenizers.normalizers import Prepend, Replace, Sequence

    spec = proto.normalizer_spec
    steps: list[Any] = (
        [Replace(Regex(r"\A +"), ""), Replace(Regex(" +"), " ")] if spec.remove_extra_whitespaces else []
    )
    steps += [Prepend(_SPACE)] if spec.add_dummy_prefix else []
    steps += [Replace(" ", _SPACE)]
    steps += [Replace(Regex(rf"{_SPACE}+\z"), "")] if spec.remove_extra_whitespaces else []
    return Sequence(steps)


def _decoder(proto: ModelProto) -> tokenizers.decoders.Decoder:
    from tokenizers import decoders

    spec = proto.normalizer_spec
    most = _ALL if spec.remove_extra_whitespaces else 1 if spec.add_dummy_prefix else 0
    strip = [decoders.Strip(" ", most, 0)] if most else []
    return decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _add_user_defined(tokenizer: tokenizers.Tokenizer, proto: ModelProto) -> None:
    """Let user-defined pieces of a BPE model be taken whole, wherever they stand.

    Hugging Face normalizes the text between added tokens part by part, which would give each part a blank in
    front. Where that matters the normalized text is cut at the pieces instead, and a part that is a piece
    is taken as it is.
    """
    from tokenizers import AddedToken, Regex
    from tokenizers.pre_tokenizers import Split

    pieces, spec = _texts(proto, Piece.USER_DEFINED), proto.normalizer_spec
    if not pieces:
        return
    if not (spec.add_dummy_prefix or spec.remove_extra_whitespaces):
        tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in pieces])
        return
    longest_first = sorted(pieces, key=len, reverse=True)
    tokenizer.pre_tokenizer = Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    tokenizer.model.ignore_merges = True


def _cut_silent_pieces(tokenizer: tokenizers.Tokenizer, proto: ModelProto) -> None:
    """Keep the spellings of byte and unused pieces from being taken for them by a unigram model.

    Each is cut between two characters that no piece which a text can give holds side by side.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    given = _texts(proto, Piece.NORMAL, Piece.USER_DEFINED)
    joined = {text[i : i + 2] for text in given for i in range(len(text) - 1)}
    cuts: set[str] = set()
    for text in _texts(proto, Piece.BYTE, Piece.UNUSED):
        free = [text[i : i + 2] for i in range(len(text) - 1) if text[i : i + 2] not in joined]
        if not free:
            raise NotExpressible(f"a text that spells {text!r} would be taken for that piece")
        cuts.add(free[0])
    if not cuts:
        return
    pattern = "|".join(f"{re.escape(left)}(?={re.escape(right)})" for left, right in map(tuple, sorted(cuts)))
    tokenizer.pre_tokenizer = Split(Regex(pattern), "merged_with_previous")


def _texts(proto: ModelProto, *types: int) -> list[str]:
    return [piece.piece for piece in proto.pieces if piece.type in types]
