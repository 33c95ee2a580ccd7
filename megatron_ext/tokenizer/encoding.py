"""The tokenizer that flags name, and the fastest encoder that gives its own ids.

tokenizer, encoder = load(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=folder))
ids, sizes = encoder(texts)         # texts as UTF-8; ids one behind the other
"""

from megatron_ext.config.data import TokenizerConfig
from megatron_ext.tokenizer.build import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
)
from megatron_ext.tokenizer.checked import Encoder, one_by_one, refusals
from megatron_ext.tokenizer.huggingface import encoder_of

__all__ = ["BACKENDS", "Encoder", "load", "make_encode", "refusals"]

#: What encodes with a Hugging Face tokenizer: the fastest that gives its ids, or its own library alone.
BACKENDS = ("auto", "tokenizers")
_loaded: dict[str, tuple[Tokenizer, Encoder]] = {}


def load(flags: TokenizerConfig, backend: str = "auto") -> tuple[Tokenizer, Encoder]:
    """The tokenizer of the flags and its encoder; loaded once, and inherited by forked workers."""
    name = repr([backend, *sorted(vars(flags).items())])
    if name not in _loaded:
        tokenizer = build_tokenizer(flags)
        _loaded[name] = tokenizer, make_encode(tokenizer, backend)
    return _loaded[name]


def make_encode(tokenizer: Tokenizer, backend: str = "auto") -> Encoder:
    """The encoder of a tokenizer: for ``backend`` "auto" the fastest, else the tokenizer's own library."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return encoder_of(tokenizer, backend)
    if isinstance(tokenizer, SentencePieceTokenizer):
        native = _native(tokenizer)
        if native is not None:
            return native
    return Encoder(type(tokenizer).__name__, one_by_one(tokenizer.tokenize, tokenizer.vocab_size))


def _native(tokenizer: SentencePieceTokenizer) -> Encoder | None:
    try:
        from megatron_ext.tokenizer.encoder import NativeEncoder
    except ImportError:
        return None
    # Not from its file: that may be another one by now.
    return NativeEncoder(model_proto=tokenizer.processor.serialized_model_proto()).encoder()
