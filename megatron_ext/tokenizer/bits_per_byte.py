"""The bytes that each token id stands for: what turns a loss in nats per token into bits per byte.

Losses of two tokenizers cannot be compared, bits per byte can: the summed loss of a text in bits,
divided by the bytes of that text (as nanochat's evaluate_bpb does it). By their bytes, too, the pieces of
tokenizers that spell them differently are the same: "\u2581cat" and "\u0120cat" are both " cat".
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"  # sentencepiece writes a blank as this
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def sentencepiece_texts(processor: "SentencePieceProcessor") -> list[bytes]:
    """UTF-8 of each piece of a ``SentencePieceProcessor``; empty for control and unknown pieces.

    A byte piece is that byte, U+2581 a blank. Pieces that are never produced (fillers) keep their text. What
    a text had before sentencepiece normalized it cannot be told from ids: U+2581 is the blank that it
    becomes, and the blank in front of a text is one.
    """
    texts = []
    for i in range(len(processor)):
        piece = processor.id_to_piece(i)
        silent = processor.is_control(i) or processor.is_unknown(i)
        texts.append(
            b"" if silent else byte_fallback_text(piece) if processor.is_byte(i) else _text_of(piece)
        )
    return texts


def huggingface_texts(tokenizer: "PreTrainedTokenizerBase") -> list[bytes]:
    """Bytes of each id of a Hugging Face tokenizer; empty for special tokens and ids without a token.

    Knows the two families in use: byte-level BPE, where one character of a piece is one byte, and
    pieces in sentencepiece's manner, with byte fallback.
    """
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = tokenizer.convert_ids_to_tokens(list(range(huggingface_size(tokenizer))))
    added = set(tokenizer.get_added_vocab())
    of_piece = byte_level_text if is_byte_level(tokenizer, pieces) else byte_fallback_text
    return [
        b"" if piece is None or number in special else piece.encode() if piece in added else of_piece(piece)
        for number, piece in enumerate(pieces)
    ]


def huggingface_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the highest id: where ids have holes, more than the number of tokens."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def lengths(texts: Iterable[bytes]) -> np.ndarray:
    """Bytes of each, int32 [vocabulary]."""
    return np.array([len(text) for text in texts], dtype=np.int32)


def _text_of(piece: str) -> bytes:
    """A piece in sentencepiece's spelling."""
    return piece.replace(SPACE, " ").encode()


def byte_fallback_text(piece: str) -> bytes:
    """The bytes of a piece in sentencepiece's spelling, where ``<0x41>`` is the byte."""
    spelled = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(spelled[1], 16)]) if spelled else _text_of(piece)


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: the printable ones for themselves, the others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_LEVEL_ALPHABET = _alphabet()


def byte_level_text(piece: str) -> bytes:
    """The bytes of a piece in GPT-2's alphabet; one in other characters stands for itself."""
    if all(character in BYTE_LEVEL_ALPHABET for character in piece):
        return bytes(BYTE_LEVEL_ALPHABET[character] for character in piece)
    return piece.encode()


def is_byte_level(tokenizer: "PreTrainedTokenizerBase", pieces: Iterable[str | None]) -> bool:
    """GPT-2's alphabet writes a blank as U+0120; sentencepiece's pieces begin with U+2581."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.decoder is not None:
        return "ByteLevel" in repr(backend.decoder)
    starts = [piece[0] for piece in pieces if piece]
    return starts.count("\u0120") > starts.count(SPACE)
