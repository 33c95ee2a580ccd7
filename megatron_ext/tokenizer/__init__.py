"""Tokenizers: building them, encoding fast, compressing vocabularies, bits per byte."""

from megatron_ext.tokenizer.build import Tokenizer, TokenizerError, build_tokenizer

__all__ = ["Tokenizer", "TokenizerError", "build_tokenizer"]
