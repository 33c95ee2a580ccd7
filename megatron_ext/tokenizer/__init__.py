"""Tokenizers: building them, encoding fast, compressing vocabularies, bits per byte."""

from typing import Any

from megatron_ext.tokenizer.build import Tokenizer, TokenizerError, build_tokenizer

__all__ = ["NativeEncoder", "Tokenizer", "TokenizerError", "build_tokenizer"]


def __getattr__(name: str) -> Any:
    # Looked up late: whoever only builds a tokenizer need not load sentencepiece.
    if name != "NativeEncoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_ext.tokenizer.encoder import NativeEncoder

    return NativeEncoder
