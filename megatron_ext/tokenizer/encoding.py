"""Texts -> ids, by the fastest encoder that gives the tokenizer's own ids."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_ext.config.data import TokenizerConfig
from megatron_ext.tokenizer.build import SentencePieceTokenizer, Tokenizer, build_tokenizer

if TYPE_CHECKING:
    from megatron_ext.tokenizer.encoder import NativeEncoder

#: (texts as UTF-8) -> (ids of all texts one behind the other [total], ids of each text int32 [texts])
Encode = Callable[[Sequence[bytes]], tuple[np.ndarray, np.ndarray]]
_loaded: dict[str, tuple[Tokenizer, Encode]] = {}


def load(flags: TokenizerConfig, dtype: np.dtype | None = None) -> tuple[Tokenizer, Encode]:
    """The tokenizer of the flags and its encoder; loaded once, and inherited by forked workers."""
    name = repr(sorted(vars(flags).items()))
    if name not in _loaded:
        tokenizer = build_tokenizer(flags)
        _loaded[name] = tokenizer, make_encode(tokenizer)
    return _loaded[name]


def make_encode(tokenizer: Tokenizer) -> Encode:
    """The compiled encoder for SentencePiece models where it is built, else the tokenizer itself.

    It raises ValueError for texts that the tokenizer cannot encode, whatever the tokenizer raises.
    """
    encode = _encoder_of(tokenizer)

    def encode_or_refuse(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        with refusals():
            return encode(texts)

    return encode_or_refuse


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Whatever a tokenizer raises over a text is a ValueError with its first line.

    Libraries in Rust panic with a BaseException of their own, which no ``except Exception`` sees.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        said = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"cannot be encoded: {kind}{said}") from error


def _encoder_of(tokenizer: Tokenizer) -> Encode:
    from megatron_ext.data.indexed import optimal_dtype

    dtype = optimal_dtype(tokenizer.vocab_size)
    if isinstance(tokenizer, SentencePieceTokenizer):
        native = _native(tokenizer)
        if native is not None:
            return lambda texts: native.encode_batch_into(texts, dtype.type)

    def encode(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        documents = [tokenizer.tokenize(text.decode("utf-8")) for text in texts]
        sizes = np.array([len(ids) for ids in documents], dtype=np.int32)
        flat = np.fromiter((i for ids in documents for i in ids), dtype=np.int64, count=int(sizes.sum()))
        if len(flat) and not 0 <= flat.min() <= flat.max() < tokenizer.vocab_size:
            raise ValueError(f"an id is outside the vocabulary of {tokenizer.vocab_size}")
        return flat.astype(dtype), sizes

    return encode


def _native(tokenizer: SentencePieceTokenizer) -> "NativeEncoder | None":
    try:
        from megatron_ext.tokenizer.encoder import NativeEncoder
    except ImportError:
        return None
    # Not from its file: that may be another one by now.
    return NativeEncoder(model_proto=tokenizer.processor.serialized_model_proto())
