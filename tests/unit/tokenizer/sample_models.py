"""Small SentencePiece models, trained when first asked for, and text that is hard on an encoder."""

import functools
import io
import random
from collections.abc import Callable

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

ModelProto = sentencepiece_model_pb2.ModelProto
NORMAL, USER_DEFINED, UNUSED, BYTE = 1, 4, 5, 6
WORDS = (
    "the of and running runner return returns self import numpy token tokens tokenizer encoder encoding "
    "model models merging merged ing ment ation 1234 2024 3.14 def class print range for in if else None True"
).split()
HAN = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下"
POOLS = [
    "abcdefghijklmnopqrstuvwxyz ,.\n", HAN, "😀👍🏽🇨🇳👨‍👩‍👧",
    "\u0301\u0300\u200b\u200d\ufeff\u202e", "\x00\x01\x02\t\r\n\x7f",
    "  ▁▁ ", "0123456789+-*/=()[]{}<>", "ａｂｃＡＢ１２", "אבגדهوعربية", "한국어テストカナ",
    "\U00020000\U0002a6d6\U0010ffff\ue000\uffff\ufffd",
]  # fmt: skip


def corpus_lines(rng: random.Random, number: int = 3000) -> list[str]:
    """Lines with words, numbers, Han and code-like text."""
    han = ["".join(rng.choices(HAN, k=2)) for _ in range(150)]
    vocabulary = WORDS * 4 + han + [a + b for a, b in zip(WORDS, WORDS[3:], strict=False)]
    return [" ".join(rng.choices(vocabulary, k=rng.randrange(4, 14))) for _ in range(number)]


@functools.cache
def trained(model_type: str = "bpe", vocab_size: int = 900, **options: object) -> bytes:
    """A serialized model trained on a small made corpus; identity normalizer unless told."""
    settings = {
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True,
        "split_digits": True, "user_defined_symbols": ["<sep>", "<UNUSED_1>", "<UNUSED_2>"],
        "max_sentence_length": 10000, "minloglevel": 2, "num_threads": 1, "hard_vocab_limit": False,
    } | options  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus_lines(random.Random(7))),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        **settings,
    )
    return model.getvalue()


def hard_text(rng: random.Random, pieces: list[str]) -> str:
    """A random string of pieces, mixed scripts, controls, and runs of one character."""
    parts = []
    for _ in range(rng.randrange(1, 12)):
        kind = rng.random()
        pool = rng.choice(POOLS)
        if kind < 0.35:
            parts.append(rng.choice(pieces))
        elif kind < 0.8:
            parts.append("".join(rng.choices(pool, k=rng.randrange(1, 20))))
        elif kind < 0.9:
            parts.append(rng.choice(pool) * rng.randrange(1, 120))
        else:
            code = rng.choice(
                [rng.randrange(1, 128), rng.randrange(0x80, 0xD800), rng.randrange(0xE000, 0x110000)]
            )
            parts.append(chr(code))
    return "".join(parts)


def hard_bytes(rng: random.Random, pieces: list[str]) -> bytes:
    """The same, damaged: bytes put in and taken out."""
    data = bytearray(hard_text(rng, pieces).encode())
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.5:
            data[at:at] = rng.randbytes(rng.randrange(1, 4))
        else:
            del data[at : at + 1]
    return bytes(data)


def hard_texts(rng: random.Random, number: int, pieces: list[str]) -> list[str | bytes]:
    """Four in five are strings, the others damaged bytes."""
    surfaces = [piece.replace("▁", " ") for piece in pieces]
    return [(hard_text if rng.random() < 0.8 else hard_bytes)(rng, surfaces) for _ in range(number)]


def changed(data: bytes, change: Callable[[ModelProto], None]) -> bytes:
    """The model after ``change(proto)``."""
    proto = ModelProto.FromString(data)
    change(proto)
    return proto.SerializeToString()
