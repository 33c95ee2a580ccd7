"""A .bin/.idx dataset with the ids of one tokenizer -> with those of another, without the text.

Ids are turned back into the bytes they stand for and encoded again. Where the old tokenizer gives text back
exactly (no normalizer, every byte has a token), that equals preprocessing the text with the new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.common.files import refuse_overwriting, unchanged
from megatron_ext.common.progress import Progress
from megatron_ext.data.indexed import DatasetError, Index, dataset_files, map_tokens, optimal_dtype
from megatron_ext.data.manifest import check_dataset, read_manifest, refuse_replacing_others
from megatron_ext.data.writer import Written, publish, write_dataset
from megatron_ext.tokenizer import encoding
from megatron_ext.tokenizer.build import Tokenizer, build_tokenizer, flags_of
from megatron_ext.tokenizer.checked import SLOW_PATH, Checked, Encode, EncodersDiffer

TOKENS_AT_ONCE = 1 << 21


class Retokenizer:
    """Translates sequences of ids between two tokenizers.

    Special tokens (such as ``</s>``) are translated by their names; what ends a document in the old tokenizer
    becomes what ends it in the new one.

    Args:
        old, new: the tokenizers.
        encode: the new one's encoder.
    """

    def __init__(self, old: Tokenizer, new: Tokenizer, encode: Encode) -> None:
        self.new, self.encode = new, encode
        self.pieces = old.token_texts()
        self.strip = b"".join(self.pieces[i] for i in old.tokenize("a")) == b" a"
        # Byte-level tokenizers put a blank only before a text that begins with none.
        self.only_missing = self.strip and list(old.tokenize(" a")) == list(old.tokenize("a"))
        self.names = {number: name for name, number in old.special_tokens().items()}
        known = new.special_tokens()
        self.special = {number: known[name] for number, name in self.names.items() if name in known}
        self.special[old.eod] = new.eod

    def translate(self, sequences: list[np.ndarray], dtype: np.dtype) -> list[np.ndarray]:
        """New ids of each sequence.

        Raises:
            ValueError: a sequence holds an id without a text, one outside the vocabulary, or a special token
                that the new tokenizer lacks.
            EncodersDiffer: in the sequence of that number.
        """
        texts: list[bytes] = []
        plans = [self._cut(sequence.tolist(), texts) for sequence in sequences]
        try:
            flat, sizes = self.encode(texts)
        except EncodersDiffer as error:
            holds = [any(is_text and part == error.text for is_text, part in plan) for plan in plans]
            raise EncodersDiffer(holds.index(True), error.reason) from None
        encoded = np.split(flat, np.cumsum(sizes)[:-1])
        parts = [
            [encoded[part] if is_text else np.array([part], dtype=dtype) for is_text, part in plan]
            for plan in plans
        ]
        empty = np.zeros(0, dtype=dtype)
        return [np.concatenate([empty, *part]).astype(dtype) for part in parts]

    def _without_prefix(self, text: bytes) -> bytes:
        """The text without the blank that the old tokenizer put in front of it."""
        own = self.only_missing and (text == b" " or text.startswith(b"  "))
        return text[1:] if self.strip and text.startswith(b" ") and not own else text

    def _cut(self, ids: list[int], texts: list[bytes]) -> list[tuple[bool, int]]:
        """(True, number of a text put into ``texts``) or (False, new special id), in order."""
        plan: list[tuple[bool, int]] = []
        run: list[bytes] = []

        def end_run() -> None:
            if run:
                text = b"".join(run)
                plan.append((True, len(texts)))
                texts.append(self._without_prefix(text))
                run.clear()

        for i in ids:
            if i >= len(self.pieces):
                raise ValueError(f"id {i} is outside the old tokenizer's {len(self.pieces)} pieces")
            if text := self.pieces[i]:
                run.append(text)
            elif i in self.special:
                end_run()
                plan.append((False, self.special[i]))
            else:
                name = self.names.get(i)
                what = "its text is lost" if name is None else f"the new tokenizer has no {name}"
                raise ValueError(f"id {i} cannot be translated: {what}")
        end_run()
        return plan


def retokenize(
    old_prefix: str, old_model: str, new_model: str, new_prefix: str, tokenizer_backend: str = "auto"
) -> dict[str, Any]:
    """Writes the dataset ``new_prefix``; the summary.

    The models are SentencePiece files or Hugging Face folders.

    Raises:
        ValueError: the dataset is damaged, changes meanwhile, is of another tokenizer, cannot be translated,
            or would be overwritten.
    """
    files = dataset_files(old_prefix)
    refuse_overwriting(dataset_files(new_prefix), [*files, old_model, new_model])
    refuse_replacing_others(new_prefix)
    old = build_tokenizer(flags_of(old_model))
    new, encoder = encoding.load(flags_of(new_model), tokenizer_backend)
    encode = Checked(encoder)
    Path(new_prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
    with unchanged(files):
        index, manifest = check_dataset(old_prefix), read_manifest(old_prefix)
        made_with = (manifest or {}).get("tokenizer", {}).get("sha256")
        if made_with and made_with != old.sha256:
            raise DatasetError(f"{old_prefix}: made with another tokenizer than {old_model}")
        written = _translate(Retokenizer(old, new, encode), old_prefix, index, new_prefix)
    tokenizer = {
        "type": type(new).__name__,
        "name": Path(new_model).name,
        "sha256": new.sha256,
        "vocab_size": new.vocab_size,
        "eod": new.eod,
    }
    source = {"name": Path(old_prefix).name, "tokenizer_sha256": old.sha256}
    common = {"tokenizer": tokenizer, "encoders": [encode.describe()], "retokenized_from": source}
    publish(written, {"dtype": optimal_dtype(new.vocab_size).name} | common)
    return {"documents": written.documents, "tokens_before": index.num_tokens, "tokens": written.tokens}


def _translate(translator: Retokenizer, old_prefix: str, index: Index, new_prefix: str) -> Written:
    """The new dataset, complete on disk and not yet in place."""
    dtype = optimal_dtype(translator.new.vocab_size)
    lengths = np.zeros(len(index.lengths), dtype=np.int32)
    progress = Progress("translating", index.num_tokens * index.dtype.itemsize, "B")

    def blocks() -> Iterator[bytes]:
        for begin, end in _batches(index):
            sequences = _translated(translator, old_prefix, index, begin, end, dtype)
            lengths[begin:end] = [len(sequence) for sequence in sequences]
            yield b"".join(sequence.tobytes() for sequence in sequences)
            size = int(index.lengths[begin:end].sum(dtype=np.int64)) * index.dtype.itemsize
            progress.add(size)

    with progress:
        return write_dataset(new_prefix, blocks(), dtype, lengths, index.documents)


def _batches(index: Index) -> Iterator[tuple[int, int]]:
    """Ranges of sequences of about TOKENS_AT_ONCE ids."""
    begin = total = 0
    for at, length in enumerate(index.lengths.tolist()):
        total += length
        if total >= TOKENS_AT_ONCE:
            yield begin, at + 1
            begin, total = at + 1, 0
    if begin < len(index.lengths):
        yield begin, len(index.lengths)


def _translated(
    translator: Retokenizer, prefix: str, index: Index, begin: int, end: int, dtype: np.dtype
) -> list[np.ndarray]:
    tokens = map_tokens(prefix, index)
    starts = (index.pointers[begin:end] // index.dtype.itemsize).tolist()
    lengths = index.lengths[begin:end].tolist()
    sequences = [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    try:
        return translator.translate(sequences, dtype)
    except EncodersDiffer as error:
        raise DatasetError(
            f"{prefix}.bin, sequence {begin + error.text}: {error.reason}; {SLOW_PATH}"
        ) from error
    except ValueError as error:
        raise DatasetError(f"{prefix}.bin, sequences {begin} to {end - 1}: {error}") from error
