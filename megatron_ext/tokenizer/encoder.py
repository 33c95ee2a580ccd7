"""Text to SentencePiece ids: a compiled encoder that gives sentencepiece's own ids, many times faster.

``NativeEncoder`` reads a SentencePiece model. BPE models are encoded by ``megatron_ext._encoder``
(see ``megatron_ext/csrc``), id for id as sentencepiece 0.2.3 does; whatever that code does not promise to
reproduce (unigram, word and char models, unused pieces of several characters, no compiled extension) is
encoded by sentencepiece itself, which is said once in the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_ext import __version__
from megatron_ext.data.indexed import optimal_dtype
from megatron_ext.tokenizer.checked import Encoder, say_once

try:
    from megatron_ext import _encoder  # type: ignore[attr-defined]  # compiled
except ImportError:  # no compiler where the package was installed
    _encoder = None

Text = str | bytes


class NativeEncoder:
    """Encodes text with a SentencePiece model.

    Texts are ``str``, or ``bytes`` holding UTF-8 in which every invalid byte counts as U+FFFD. Methods may be
    called from several threads; the compiled encoder works without the GIL.

    Attributes:
        vocab_size: number of pieces.
        eod: id that ends a document (the model's ``</s>``), -1 if the model has none.
        native: whether the compiled encoder is used.
        fallback_reason: why it is not, or None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a SentencePiece model.
    """

    def __init__(self, model_file: str | Path | None = None, *, model_proto: bytes | None = None) -> None:
        """Loads ``model_file``, or the serialized ModelProto ``model_proto``, which may be what it held."""
        if model_proto is None:
            if model_file is None:
                raise TypeError("give model_file or model_proto")
            model_proto = Path(model_file).read_bytes()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
            self.vocab_size: int = self.processor.get_piece_size()
            self.eod: int = self.processor.eos_id()
        except Exception as error:
            name = model_file if model_file is not None else "model_proto"
            raise ValueError(f"{name} is not a usable SentencePiece model: {error}") from error
        self.fallback_reason: str | None = None
        self._native = self._build(model_proto)
        self.native = self._native is not None

    def _build(self, proto: bytes) -> _encoder.Encoder | None:
        if _encoder is None:
            self.fallback_reason = "the extension megatron_ext._encoder is not built"
        else:
            try:
                return _encoder.Encoder(proto)
            except _encoder.UnsupportedModel as error:
                self.fallback_reason = str(error)
        say_once(f"text is encoded by sentencepiece, many times slower: {self.fallback_reason}")
        return None

    def encode(self, text: Text) -> np.ndarray:
        """Ids of one text, int32 [tokens]."""
        return self.encode_batch_into([text], np.int32)[0]

    def encode_batch(self, texts: Sequence[Text], num_threads: int = 1) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens]; the arrays are views of one buffer."""
        flat, sizes = self.encode_batch_into(texts, np.int32, num_threads=num_threads)
        ends = np.cumsum(sizes, dtype=np.int64).tolist()
        return [flat[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def encode_batch_into(
        self,
        texts: Sequence[Text],
        dtype: type | np.dtype | None = None,
        append_eod: bool = False,
        num_threads: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one behind the other, as a .bin file holds them.

        Args:
            texts: the documents.
            dtype: ``np.uint16`` or ``np.int32``; ``optimal_dtype(vocab_size)`` if not given.
            append_eod: end every document with ``eod``; one without ids stays empty, as upstream has it.
            num_threads: threads of the compiled encoder.

        Returns:
            The ids, ``dtype`` [total], and the number of ids of each text, int32 [texts].

        Raises:
            ValueError: ids do not fit ``dtype``, or ``append_eod`` and the model has no ``</s>``.
            UnicodeEncodeError: a ``str`` holds lone surrogates.
        """
        dtype = np.dtype(optimal_dtype(self.vocab_size) if dtype is None else dtype)
        if dtype not in (np.dtype(np.uint16), np.dtype(np.int32)):
            raise ValueError(f"ids are stored as uint16 or int32, not {dtype}")
        if dtype == np.uint16 and self.vocab_size > 65536:
            raise ValueError(f"the ids of {self.vocab_size} pieces do not fit uint16")
        if append_eod and self.eod < 0:
            raise ValueError("append_eod: the model has no </s> piece to end documents with")
        eod = self.eod if append_eod else -1
        if self._native is None:
            return self._encode_slowly(texts, dtype, eod)
        encode = self._native.encode_uint16 if dtype == np.uint16 else self._native.encode_int32
        return encode(self._normalized(texts), num_threads, eod)

    def count(self, texts: Sequence[Text], num_threads: int = 1) -> np.ndarray:
        """Number of ids of each text, int64 [texts], without keeping the ids."""
        if self._native is None:
            return np.array([len(self.processor.encode(text)) for text in texts], dtype=np.int64)
        return self._native.count(self._normalized(texts), num_threads)

    def add_histogram(self, texts: Sequence[Text], histogram: np.ndarray) -> None:
        """Adds to ``histogram``, int64 [vocab_size], how often each id occurs in the texts."""
        if self._native is not None:
            self._native.histogram(self._normalized(texts), histogram)
            return
        for text in texts:
            histogram += np.bincount(self.processor.encode(text), minlength=self.vocab_size)

    def encoder(self, reference: Encoder | None = None) -> Encoder:
        """This as an ``Encoder``; ``reference`` is what its ids are compared with while it works."""
        ours, theirs = f"megatron_ext {__version__}", f"sentencepiece {sentencepiece.__version__}"
        dtype = optimal_dtype(self.vocab_size).type
        name = ours if self.native else theirs
        return Encoder(name, lambda texts: self.encode_batch_into(texts, dtype), reference)

    def derivations(self) -> np.ndarray:
        """How each piece comes about, int32 [vocab_size, 2]: the ids of the two pieces its last merge joins.

        -1 stands for a character that is no piece; both are -1 for single characters and pieces that are not
        merged (byte, control, user-defined); both are -2 for a normal piece that no text can produce.

        Raises:
            ValueError: the compiled encoder does not read this model.
        """
        if self._native is None:
            raise ValueError(f"no derivations: {self.fallback_reason}")
        return self._native.derivations()

    def clear_cache(self) -> None:
        """Forgets the words met so far (for measuring)."""
        if self._native is not None:
            self._native.clear_cache()

    @property
    def adds_dummy_prefix(self) -> bool:
        """Whether a blank is put in front of every text."""
        return self.processor.normalize("a") != "a"

    def _encode_slowly(
        self, texts: Sequence[Text], dtype: np.dtype, eod: int
    ) -> tuple[np.ndarray, np.ndarray]:
        documents = [self.processor.encode(text) for text in texts]
        if eod >= 0:
            documents = [ids + [eod] if ids else ids for ids in documents]
        sizes = np.array([len(ids) for ids in documents], dtype=np.int32)
        flat = np.fromiter((i for ids in documents for i in ids), dtype=dtype, count=int(sizes.sum()))
        return flat, sizes

    def _normalized(self, texts: Sequence[Text]) -> Sequence[Text]:
        """Through sentencepiece's normalizer where the model has one that is not just blanks."""
        if self._native is None or not self._native.needs_normalizer:
            return texts
        return [self.processor.normalize(text) for text in texts]
