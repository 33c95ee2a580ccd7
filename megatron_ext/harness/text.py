"""Bits per byte of texts: the loss of a whole text in bits, divided by its bytes in UTF-8.

It does not depend on how a tokenizer cuts the text, so it compares models of different ones. Each text is
read by itself, after the end of a document, in windows of as many tokens as the model has positions.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from megatron_ext.common.errors import first_line
from megatron_ext.data.text.chunks import chunks, place_name
from megatron_ext.data.text.documents import BadDocument, Documents
from megatron_ext.data.text.sources import COMPRESSED_SUFFIXES, Source, SourceError, find_sources
from megatron_ext.data.text.unpack import is_damage, unpacked
from megatron_ext.evaluation.documents import EvaluationError
from megatron_ext.evaluation.requests import Encoder
from megatron_ext.evaluation.scoring import Scorer
from megatron_ext.harness.load import Opened

_KEY = "text"
_TEXT_SUFFIXES = tuple(f".txt{packed}" for packed in COMPRESSED_SUFFIXES)
#: What documents are listed under that have none, beside others that do.
_NO_SOURCE = "(no source)"
_CHUNK_BYTES = 1 << 22
_TEXTS_AT_ONCE = 256


def measure(words: Sequence[str], model: Opened, scorer: Scorer) -> dict[str, Any]:
    """Each file's bits per byte, and those of each source in it; a collective call.

    ``words`` are files, folders and globs of JSON Lines and parquet, as for preprocessing, and files and
    globs of .txt, which may be compressed. Sources are given where a record has one.

    Raises:
        EvaluationError: a record has no text, or a file holds none.
    """
    return {path: _of_file(texts, path, model, scorer) for path, texts in _files(words)}


def _of_file(texts: Iterable[tuple[str, str]], path: str, model: Opened, scorer: Scorer) -> dict[str, Any]:
    encoder, texts = Encoder(model.tokenizer, model.start), iter(texts)
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0])  # documents, bits, bytes
    while some := list(islice(texts, _TEXTS_AT_ONCE)):
        scores = scorer([encoder.rolling(text) for _, text in some])
        for (source, text), score in zip(some, scores, strict=True):
            entry = sums[source]
            entry[0] += 1
            entry[1] -= score.logprob / math.log(2)
            entry[2] += len(text.encode())
    if not sums:
        raise EvaluationError(f"--bits-per-byte {path}: holds no text")
    whole = [sum(column) for column in zip(*sums.values(), strict=True)]
    sources = {source or _NO_SOURCE: _summary(entry) for source, entry in sorted(sums.items())}
    return _summary(whole) | {"sources": sources if any(sums) else {}}


def _summary(sums: Sequence[float]) -> dict[str, Any]:
    documents, bits, size = sums
    return {"documents": documents, "bytes": size, "bits_per_byte": bits / size}


def _files(words: Sequence[str]) -> Iterator[tuple[str, Iterator[tuple[str, str]]]]:
    """Each file with its texts, as (source, text)."""
    try:
        sources = find_sources(words, keys=[_KEY])
    except SourceError as error:
        raise EvaluationError(str(error).replace("--input", "--bits-per-byte")) from error
    for source in sources:
        yield source.path, _whole(source) if source.path.endswith(_TEXT_SUFFIXES) else _records(source)


def _whole(source: Source) -> Iterator[tuple[str, str]]:
    """A file as one text, with the line ends that it has; a byte order mark is no part of it."""
    try:
        with open(source.path, "rb") as file:
            text = unpacked(file, source.kind).read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 ({error.reason} at byte {error.start})"
        raise EvaluationError(f"--bits-per-byte {source.path}: {reason}") from error
    except Exception as error:
        if not is_damage(error):
            raise
        raise EvaluationError(f"--bits-per-byte {source.path}: {first_line(error)}") from error
    if text:
        yield "", text


def _records(source: Source) -> Iterator[tuple[str, str]]:
    for chunk in chunks([source], _CHUNK_BYTES):
        for found in Documents(chunk, [_KEY]):
            if isinstance(found, BadDocument):
                place = place_name(chunk, found.place)
                raise EvaluationError(f"--bits-per-byte {source.path}: {place}: {found.reason}")
            for text in found.texts[0]:
                if text:
                    yield found.source, text.decode()
