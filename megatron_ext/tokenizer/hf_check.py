"""Whether a Hugging Face tokenizer does what a SentencePiece model does, on texts that show differences."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

if TYPE_CHECKING:
    import tokenizers

Piece = ModelProto.SentencePiece
_SPACE = "▁"
#: Blanks, digits, marks and scripts, by which tokenizers differ.
TEXTS = (
    *(
        "",
        " ",
        "   ",
        "a",
        " a",
        "a ",
        "  a  b  ",
        "\n",
        "\n\n\n",
        " \n a\n\n",
        "\t a\t\tb",
        "a\r\n",
        "\u3000a",
    ),
    *(
        "\u00a0a\u00a0",
        "\u2028\u2029\u0085",
        "▁",
        "▁a ▁",
        " ▁▁ a",
        "0123456789",
        "3.14 1,000",
        "١٢٣",
        "ﬁsh ½ Å",
    ),
    *(
        "e\u0301 é ẹ\u0301",
        "Ａｂ１",
        "ｶﾞ",
        "\ufeffa",
        "a\u200bb\u200dc",
        "\u202eabc",
        "a\x00b\x01\x7f",
        "\ufffd",
    ),
    *(
        "😀👍🏽🇨🇳👨‍👩‍👧",
        "中文,日本語、한국어",
        "𠀀\U0010ffff",
        "if x:\n    return x  # no\n\n",
        "don't",
        "A" * 300,
    ),
    *("<0x41>", "<0x41", "a<0xE4>b", "</s>", "a<s>b</s>", "<unk>", "x<unk> y"),
)
_LINES, _PIECES_A_LINE = 4000, 12


def first_difference(
    processor: SentencePieceProcessor, proto: ModelProto, tokenizer: tokenizers.Tokenizer
) -> str | None:
    """A text on which the two differ, in words; None if they do on none of ``texts``.

    Control pieces that are spelled out in a text are text here, as for sentencepiece; transformers looks for
    them unless it is told ``split_special_tokens``, which a unigram model does not heed.
    """
    tokenizer.encode_special_tokens = True
    control = [] if proto.trainer_spec.model_type == TrainerSpec.BPE else _control_pieces(proto)
    for text in texts(proto):
        if any(piece in text for piece in control):
            continue
        ids = processor.encode(text)
        came = tokenizer.encode(text, add_special_tokens=False).ids
        if came != ids:
            return f"{text[:80]!r} is {_spelled(processor, ids)}, not {_spelled(processor, came)}"
        if processor.unk_id() in ids:
            continue  # decoded differently on purpose
        right, back = processor.decode(ids), tokenizer.decode(ids, skip_special_tokens=False)
        if right != back:
            return f"{text[:80]!r} is decoded as {right[:80]!r}, not as {back[:80]!r}"
    return None


def _spelled(processor: SentencePieceProcessor, ids: list[int]) -> list[str]:
    return [processor.id_to_piece(i) for i in ids[:20]]


def _control_pieces(proto: ModelProto) -> list[str]:
    return [piece.piece for piece in proto.pieces if piece.type in (Piece.CONTROL, Piece.UNKNOWN)]


def texts(proto: ModelProto) -> Iterator[str]:
    """Blanks, scripts and marks; each user-defined piece in several places; all pieces in random order."""
    yield from TEXTS
    spelled = [(piece.piece.replace(_SPACE, " "), piece.type) for piece in proto.pieces]
    user_defined = [text for text, kind in spelled if kind == Piece.USER_DEFINED]
    pieces = [text for text, kind in spelled if kind in (Piece.NORMAL, Piece.USER_DEFINED)]
    for piece in user_defined:
        for text in (
            "{0}",
            "{0}{0}",
            " {0} ",
            "a{0}b",
            "a {0} b",
            "  {0}  ",
            "\n{0}\n",
            "{0}a {0}",
            "a  {0}",
        ):
            yield text.format(piece)
    order = random.Random(0)
    order.shuffle(pieces)
    for start in range(0, len(pieces), _PIECES_A_LINE):
        yield "".join(pieces[start : start + _PIECES_A_LINE])
    for _ in range(_LINES):
        words = order.choices(pieces, k=order.randrange(1, _PIECES_A_LINE))
        yield order.choice(("", " ", "\n")).join(
            [*words, *order.choices(user_defined or words, k=1), *words[:1]]
        )
