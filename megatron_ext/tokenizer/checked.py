"""An encoder, and what checks it: texts -> ids by one library, a sample compared with another's.

encode = Checked(encoder)
ids, sizes = encode(texts)          # raises EncodersDiffer
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from megatron_ext.common.errors import first_line

logger = logging.getLogger(__name__)

#: (texts as UTF-8) -> (ids of all texts one behind the other [total], ids of each text int32 [texts])
Encode = Callable[[Sequence[bytes]], tuple[np.ndarray, np.ndarray]]
#: What to do where encoders differ.
SLOW_PATH = "--tokenizer-backend tokenizers encodes with that library alone, and is about ten times slower"
#: Texts that a ``Checked`` compares: the first ones, and of the others about one in so many.
FIRST, ONE_IN = 16, 256


@dataclass(frozen=True)
class Encoder:
    """Texts -> ids by one library.

    Attributes:
        name: the library and its version, such as "gigatoken 0.10.0".
        encode: does it; ids are of ``optimal_dtype(vocab_size)``.
        reference: the tokenizer's own library, with whose ids these are to be compared; None where this is
            it, or where the tests prove the equality for all texts.
    """

    name: str
    encode: Encode
    reference: "Encoder | None" = None

    def __call__(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [total], ids of each text int32 [texts]); ValueError, whatever the library raises."""
        with refusals():
            return self.encode(texts)


class EncodersDiffer(Exception):
    """An encoder gave other ids than the tokenizer's own library; ``text`` is the number of the text."""

    def __init__(self, text: int, reason: str) -> None:
        super().__init__(text, reason)
        self.text, self.reason = text, reason


class Checked:
    """An encoder whose ids are compared with its reference: of the first ``first`` texts, and of a sample.

    A text is in the sample by its content, so that the same texts are compared for any number of workers.

    Attributes:
        texts, compared: how many came, and how many of them were compared.
    """

    def __init__(self, encoder: Encoder, first: int = FIRST) -> None:
        self.encoder, self.first = encoder, first
        self.texts = self.compared = 0

    def __call__(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """As the encoder's.

        Raises:
            EncodersDiffer: the ids of a text differ.
            ValueError: a text cannot be encoded.
        """
        ids, sizes = self.encoder(texts)
        if self.encoder.reference is not None:
            ends = np.cumsum(sizes, dtype=np.int64)
            for number, text in enumerate(texts):
                if self.texts + number < self.first or crc32(text) % ONE_IN == 0:
                    self._compare(number, text, ids[ends[number] - sizes[number] : ends[number]])
        self.texts += len(texts)
        return ids, sizes

    def describe(self) -> dict[str, Any]:
        """For a manifest: who encoded, with whose ids a sample was compared, and how many texts."""
        reference = self.encoder.reference
        return {
            "name": self.encoder.name,
            "compared_with": reference.name if reference else None,
            "texts": self.texts,
            "texts_compared": self.compared,
        }

    def _compare(self, number: int, text: bytes, ids: np.ndarray) -> None:
        reference = self.encoder.reference
        assert reference is not None
        if not np.array_equal(ids, reference([text])[0]):
            raise EncodersDiffer(number, f"{self.encoder.name} gives other ids than {reference.name}")
        self.compared += 1


def one_by_one(tokenize: Callable[[str], Sequence[int]], vocab_size: int) -> Encode:
    """An ``Encode`` of a function for one text."""
    from megatron_ext.data.indexed import optimal_dtype

    dtype = optimal_dtype(vocab_size)

    def encode(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        return joined([tokenize(text.decode("utf-8")) for text in texts], vocab_size, dtype)

    return encode


def joined(
    documents: Sequence[Sequence[int] | np.ndarray], vocab_size: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of each text -> what an ``Encode`` returns.

    Raises:
        ValueError: an id is outside the vocabulary.
    """
    sizes = np.fromiter(map(len, documents), dtype=np.int32, count=len(documents))
    if not sizes.any():
        return np.zeros(0, dtype), sizes
    flat = np.concatenate(
        [np.asarray(ids, dtype=np.int64) if isinstance(ids, list) else ids for ids in documents]
    )
    if not 0 <= flat.min() <= flat.max() < vocab_size:
        raise ValueError(f"an id is outside the vocabulary of {vocab_size}")
    return flat.astype(dtype), sizes


@contextlib.contextmanager
def refusals(what: str = "cannot be encoded") -> Iterator[None]:
    """Whatever a tokenizer raises over a text is a ValueError with its first line.

    Libraries in Rust panic with a BaseException of their own, which no ``except Exception`` sees.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        kind, said = type(error), first_line(error)
        named = "" if kind in (ValueError, KeyError) or said == kind.__name__ else f"{kind.__name__}: "
        raise ValueError(f"{what}: {named}{said}") from error


@functools.cache
def say_once(message: str) -> None:
    """A warning that the log holds once."""
    logger.warning(message)
