"""Encoders of a Hugging Face tokenizer: its own library, and faster ones that give the same ids.

A faster one is taken if it reads the tokenizer and gives the library's ids for ``probes``; what it then
encodes is compared by sample (``checked.Checked``).
"""

from __future__ import annotations

import functools
import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import psutil

from megatron_ext.data.indexed import optimal_dtype
from megatron_ext.tokenizer.build import HuggingFaceTokenizer
from megatron_ext.tokenizer.checked import Encoder, joined, one_by_one, refusals, say_once
from megatron_ext.tokenizer.hf_check import TEXTS
from megatron_ext.tokenizer.hf_import import sentencepiece_of

#: Bytes by which a process may grow before gigatoken forgets the words that it met.
MEMORY = 1 << 30
#: Characters from here on are taken for unassigned: none but variation selectors and private ones are.
_LAST_PLANES = 0x40000
_LINES, _PIECES_A_LINE, _RUNS = 200, 12, range(1, 70)


def encoder_of(tokenizer: HuggingFaceTokenizer, backend: str) -> Encoder:
    """The fastest encoder that gives the tokenizer's ids; for ``backend`` "tokenizers" its own library.

    That it has to be a slow one is said once in the log, and why.
    """
    texts = list(probes(tokenizer))
    size = tokenizer.vocab_size
    slow = Encoder(f"transformers {version('transformers')}", one_by_one(tokenizer.tokenize, size))
    try:
        library = _library(tokenizer)
        _require_equal(library, slow, texts)
    except ValueError as error:
        say_once(f"text is encoded by {slow.name}, many times slower than by tokenizers: {error}")
        return slow
    if backend == "tokenizers":
        return library
    reasons = []
    for make in (_natively, _with_gigatoken):
        try:
            encoder = make(tokenizer, library)
            _require_equal(encoder, library, texts)
            return encoder
        except ValueError as error:
            reasons.append(str(error))
    say_once(f"text is encoded by {library.name}, about ten times slower than by gigatoken: {reasons[-1]}")
    return library


def _library(tokenizer: HuggingFaceTokenizer) -> Encoder:
    """The package ``tokenizers``."""
    backend, special = _backend(tokenizer), tokenizer.include_special_tokens

    def tokenize(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=special).ids

    return Encoder(f"tokenizers {version('tokenizers')}", one_by_one(tokenize, tokenizer.vocab_size))


def _backend(tokenizer: HuggingFaceTokenizer) -> Any:
    """The ``tokenizers.Tokenizer`` in one of transformers, never truncating; ValueError if there is none."""
    backend = getattr(tokenizer.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("it is not a tokenizer of the package tokenizers")
    backend.no_truncation()  # as transformers sets it for each text
    backend.no_padding()
    return backend


def _json(tokenizer: HuggingFaceTokenizer) -> str:
    """What ``tokenizer.json`` would say of the tokenizer; ValueError if more than that decides its ids."""
    backend = _backend(tokenizer)
    if tokenizer.include_special_tokens or backend.encode_special_tokens:
        raise ValueError("special tokens are added to texts, or not looked for in them")
    return backend.to_str()


def _natively(tokenizer: HuggingFaceTokenizer, library: Encoder) -> Encoder:
    """Our own encoder, where the tokenizer is a SentencePiece model in disguise."""
    if not getattr(_backend(tokenizer).model, "byte_fallback", False):
        raise ValueError("it has no byte fallback")
    imported = sentencepiece_of(_json(tokenizer))
    encode_all = imported.encoder.encode_batch_into
    size, dtype = tokenizer.vocab_size, optimal_dtype(tokenizer.vocab_size)

    def encode(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if all(map(imported.takes, texts)):
            return encode_all(texts, dtype.type)
        taken = [imported.takes(text) for text in texts]
        ours = iter(imported.encoder.encode_batch([t for t, take in zip(texts, taken, strict=True) if take]))
        ids = [next(ours) if take else library([t])[0] for t, take in zip(texts, taken, strict=True)]
        return joined(ids, size, dtype)

    return Encoder(imported.encoder.encoder().name, encode, library)


def _with_gigatoken(tokenizer: HuggingFaceTokenizer, library: Encoder) -> Encoder:
    """gigatoken; a text with characters that the two may class differently is encoded by the library."""
    gigatoken = _Gigatoken(_json(tokenizer))
    dtype, size = optimal_dtype(tokenizer.vocab_size), tokenizer.vocab_size

    def encode(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        encode_one = gigatoken.encoder()
        if not _is_unsettled(b"\n".join(texts)):
            return joined(list(map(encode_one, texts)), size, dtype)
        ids = [library([text])[0] if _is_unsettled(text) else encode_one(text) for text in texts]
        return joined(ids, size, dtype)

    return Encoder(f"gigatoken {version('gigatoken')}", encode, library)


class _Gigatoken:
    """gigatoken with the tokenizer of a ``tokenizer.json``.

    It remembers every word that it meets, without end: where the process has grown much it is loaded anew.

    Raises:
        ValueError: it is not installed, or does not read the tokenizer.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self._load()

    def encoder(self) -> Callable[[bytes], np.ndarray]:
        """Encodes one text."""
        if _resident_bytes() > self._most:
            self._load()
        return self._encode

    def _load(self) -> None:
        try:
            from gigatoken.gigatoken_rs import load_hf_json
        except ImportError as error:
            raise ValueError(f"it is not installed ({error}); pip install gigatoken") from error
        self._encode: Any = None  # what it remembers goes first
        with refusals("gigatoken does not read the tokenizer"):
            self._encode = load_hf_json(self.description).encode
        self._most = _resident_bytes() + MEMORY


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


@functools.cache
def _unassigned() -> np.ndarray:
    """Of each code point, whether this Python's Unicode tables know no character there: bool [code points].

    What a newer Unicode adds, one library may take for a letter and another for none.
    """
    table = np.ones(0x110000, dtype=bool)
    table[:_LAST_PLANES] = [unicodedata.category(chr(code)) == "Cn" for code in range(_LAST_PLANES)]
    return table


def _is_unsettled(text: bytes) -> bool:
    """Whether a text, which must be UTF-8, holds characters that libraries may class differently."""
    if text.isascii():
        return False
    codes = np.frombuffer(text.decode("utf-8").encode("utf-32-le"), dtype=np.uint32)
    return bool(_unassigned()[codes].any())


def _require_equal(encoder: Encoder, library: Encoder, texts: Sequence[bytes]) -> None:
    """Raise ValueError if the encoder gives other ids than the library for one of the texts."""
    for text in texts:
        if not np.array_equal(encoder([text])[0], library([text])[0]):
            raise ValueError(f"{encoder.name} encodes {text.decode()[:60]!r} otherwise")


def probes(tokenizer: HuggingFaceTokenizer) -> Iterator[bytes]:
    """Scripts, marks, runs of one character; each added token in several places; pieces in random order."""
    yield from (text.encode() for text in TEXTS)
    yield from (f"a{run * length}b{run * length}".encode() for run in " \n\t=0" for length in _RUNS)
    for token in tokenizer.tokenizer.get_added_vocab():
        yield f"a{token}b {token} 1{token}{token}\n{token[:-1]}".encode()
    pieces = [text.decode("utf-8", "ignore") for text in tokenizer.token_texts()]
    draw = random.Random(0)
    for _ in range(_LINES):
        yield "".join(draw.choices(pieces, k=_PIECES_A_LINE)).encode()
