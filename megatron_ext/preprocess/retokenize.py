"""A .bin/.idx dataset with the ids of one SentencePiece model -> with those of another, without the text.

Ids are turned back into the bytes they stand for and encoded again. Where the old tokenizer gives text back
exactly (identity normalizer, byte fallback), that equals preprocessing the text with the new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ext.common.files import refuse_overwriting, sha256, unchanged
from megatron_ext.common.progress import Progress
from megatron_ext.data.indexed import DatasetError, Index, dataset_files, map_tokens, optimal_dtype
from megatron_ext.data.manifest import check_dataset, read_manifest, refuse_replacing_others
from megatron_ext.data.writer import Written, publish, write_dataset
from megatron_ext.tokenizer.encoder import NativeEncoder

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

TOKENS_AT_ONCE = 1 << 21


class Retokenizer:
    """Translates sequences of ids between two models.

    Control pieces (such as ``</s>``) are translated by their names.

    Args:
        old, new: the tokenizers.
    """

    def __init__(self, old: NativeEncoder, new: NativeEncoder) -> None:
        self.new, self.strip = new, old.adds_dummy_prefix
        self.pieces = [_bytes_of(old.processor, i) for i in range(old.vocab_size)]
        self.names = {i: old.processor.id_to_piece(i) for i, text in enumerate(self.pieces) if text is None}
        self.unknown = old.processor.unk_id()
        found = {i: new.processor.piece_to_id(name) for i, name in self.names.items()}
        self.control = {i: to for i, to in found.items() if new.processor.is_control(to)}

    def translate(self, sequences: list[np.ndarray], dtype: np.dtype) -> list[np.ndarray]:
        """New ids of each sequence.

        Raises:
            ValueError: a sequence holds the unknown id, an id outside the vocabulary, or a control piece that
                the new model lacks.
        """
        texts: list[bytes] = []
        plans = [self._cut(sequence.tolist(), texts) for sequence in sequences]
        encoded = self.new.encode_batch(texts)
        parts = [
            [encoded[part] if is_text else np.array([part], dtype=dtype) for is_text, part in plan]
            for plan in plans
        ]
        empty = np.zeros(0, dtype=dtype)
        return [np.concatenate([empty, *part]).astype(dtype) for part in parts]

    def _cut(self, ids: list[int], texts: list[bytes]) -> list[tuple[bool, int]]:
        """(True, number of a text put into ``texts``) or (False, new control id), in order."""
        plan: list[tuple[bool, int]] = []
        run: list[bytes] = []

        def end_run() -> None:
            if run:
                text = b"".join(run)
                plan.append((True, len(texts)))
                texts.append(text[1:] if self.strip and text.startswith(b" ") else text)
                run.clear()

        for i in ids:
            if i >= len(self.pieces):
                raise ValueError(f"id {i} is outside the old model's {len(self.pieces)} pieces")
            text = self.pieces[i]
            if text is not None:
                run.append(text)
                continue
            if i not in self.control:
                what = "its text is lost" if i == self.unknown else "the new model has no such control piece"
                raise ValueError(f"id {i} ({self.names[i]}) cannot be translated: {what}")
            end_run()
            plan.append((False, self.control[i]))
        end_run()
        return plan


def _bytes_of(processor: SentencePieceProcessor, i: int) -> bytes | None:
    """The UTF-8 bytes an id stands for; None for control and unknown pieces."""
    piece = processor.id_to_piece(i)
    if processor.is_control(i) or processor.is_unknown(i):
        return None
    return bytes([int(piece[3:5], 16)]) if processor.is_byte(i) else piece.replace("▁", " ").encode()


def retokenize(old_prefix: str, old_model: str, new_model: str, new_prefix: str) -> dict[str, Any]:
    """Writes the dataset ``new_prefix``; the summary.

    Raises:
        ValueError: the dataset is damaged, changes meanwhile, is of another tokenizer, cannot be translated,
            or would be overwritten.
    """
    files = dataset_files(old_prefix)
    refuse_overwriting(dataset_files(new_prefix), [*files, old_model, new_model])
    refuse_replacing_others(new_prefix)
    old_proto, new_proto = Path(old_model).read_bytes(), Path(new_model).read_bytes()
    old = NativeEncoder(old_model, model_proto=old_proto)
    new = NativeEncoder(new_model, model_proto=new_proto)
    Path(new_prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
    with unchanged(files):
        index, manifest = check_dataset(old_prefix), read_manifest(old_prefix)
        made_with = (manifest or {}).get("tokenizer", {}).get("sha256")
        if made_with and made_with != sha256(old_proto):
            raise DatasetError(f"{old_prefix}: made with another tokenizer than {old_model}")
        written = _translate(Retokenizer(old, new), old_prefix, index, new_prefix)
    tokenizer = {
        "type": "SentencePieceTokenizer",
        "name": Path(new_model).name,
        "sha256": sha256(new_proto),
        "vocab_size": new.vocab_size,
        "eod": new.eod,
    }
    source = {"name": Path(old_prefix).name, "tokenizer_sha256": sha256(old_proto)}
    dtype = optimal_dtype(new.vocab_size)
    publish(written, {"dtype": dtype.name, "tokenizer": tokenizer, "retokenized_from": source})
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
    except ValueError as error:
        raise DatasetError(f"{prefix}.bin, sequences {begin} to {end - 1}: {error}") from error
