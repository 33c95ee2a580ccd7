"""The tokens of bytes in the middle of a text: merges alone, with nothing put in front and nothing cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megatron_ext.tokenizer.bits_per_byte import BYTE_LEVEL_ALPHABET, SPACE, is_byte_level
from megatron_ext.tokenizer.build import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.pieces import pieces

#: Bytes -> ids; None for bytes that are not whole characters, where characters are what is merged.
EncodeInside = Callable[[bytes], list[int] | None]


def encode_inside(tokenizer: Tokenizer) -> EncodeInside:
    """The encoder of a tokenizer for bytes that stand within a longer text.

    Normalization has been done, or the bytes would not be those of tokens.

    Raises:
        ValueError: the tokenizer has no pieces, or none that the package tokenizers merges.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece(tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _huggingface(tokenizer)
    raise ValueError(f"{type(tokenizer).__name__} has no pieces: its ids are numbers")


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> EncodeInside:
    proto = ModelProto.FromString(tokenizer.processor.serialized_model_proto())
    rules = proto.normalizer_spec
    rules.add_dummy_prefix = rules.remove_extra_whitespaces = False
    rules.name, rules.precompiled_charsmap = "identity", b""
    encoder = NativeEncoder(model_proto=proto.SerializeToString())

    def encode(text: bytes) -> list[int] | None:
        return encoder.encode(text).tolist() if _is_utf8(text) else None

    return encode


def _huggingface(tokenizer: HuggingFaceTokenizer) -> EncodeInside:
    backend: Any = getattr(tokenizer.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("a tokenizer without tokenizer.json; save it with transformers as a fast tokenizer")
    model = backend.model
    letter = {byte: character for character, byte in BYTE_LEVEL_ALPHABET.items()}

    def byte_level(text: bytes) -> list[int] | None:
        return [token.id for token in model.tokenize("".join(letter[byte] for byte in text))]

    def characters(text: bytes) -> list[int] | None:
        if not _is_utf8(text):
            return None
        return [token.id for token in model.tokenize(text.decode().replace(" ", SPACE))]

    return byte_level if is_byte_level(tokenizer.tokenizer, pieces(tokenizer)) else characters


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
