"""Compression of SentencePiece models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megatron_ext.common.files import sha256, write_aside
from megatron_ext.tokenizer import hf_export
from megatron_ext.tokenizer.bits_per_byte import lengths, sentencepiece_texts
from megatron_ext.tokenizer.compress import FILLER, CompressionError, Vocabulary, choose
from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.hf_folder import refuse_others, write_folder

Piece = ModelProto.SentencePiece
BPE, UNIGRAM = 2, 1


def read_proto(data: bytes) -> ModelProto:
    """Parses a model file.

    Raises:
        CompressionError: it is not a SentencePiece model, or neither BPE nor unigram.
    """
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:
        raise CompressionError(f"not a SentencePiece model: {error}") from error
    if proto.trainer_spec.model_type not in (BPE, UNIGRAM):
        raise CompressionError("only BPE and unigram models can be compressed")
    return proto


def describe(proto: ModelProto, encoder: NativeEncoder, drop_fillers: bool, counts: np.ndarray) -> Vocabulary:
    """The vocabulary of a model; fillers that never occur shall go if ``drop_fillers``."""
    texts = [piece.piece for piece in proto.pieces]
    types = np.array([piece.type for piece in proto.pieces])
    # An unused piece can never come out, a piece with a NUL is unused for sentencepiece.
    fixed = (types != Piece.NORMAL) & (types != Piece.UNUSED)
    dead = (types == Piece.UNUSED) | np.array(["\0" in text for text in texts])
    fillers = np.zeros(len(texts), dtype=bool)
    if drop_fillers:
        for i in np.flatnonzero((types == Piece.USER_DEFINED) & (counts == 0)):
            fillers[i] = FILLER.fullmatch(texts[i]) is not None
    parts: list[tuple[int, ...]] = [()] * len(texts)
    if proto.trainer_spec.model_type == BPE:
        derivations = encoder.derivations()
        dead |= derivations[:, 0] == -2
        parts = [tuple(part for part in pair if part >= 0) for pair in derivations.tolist()]
    if proto.trainer_spec.byte_fallback:
        byte_ids = {int(text[3:5], 16): i for i, text in enumerate(texts) if types[i] == Piece.BYTE}
    for i in np.flatnonzero((types == Piece.NORMAL) & ~dead):
        if len(texts[i]) == 1 and proto.trainer_spec.byte_fallback:
            parts[i] = tuple(byte_ids[byte] for byte in texts[i].encode())
        elif len(texts[i]) == 1:
            fixed[i] = True
    return Vocabulary(texts, parts, fixed & ~fillers, dead, fillers)


def choose_unigram(vocabulary: Vocabulary, counts: np.ndarray, vocab_size: int) -> np.ndarray:
    """The most frequent pieces of a unigram model, where no piece needs another; characters stay.

    Raises:
        CompressionError: as for ``choose``.
    """
    size = len(vocabulary.texts)
    must = vocabulary.fixed | np.array([len(t) == 1 for t in vocabulary.texts]) & ~vocabulary.dead
    if not must.sum() <= vocab_size <= size:
        raise CompressionError(f"--vocab-size must be between {int(must.sum())} and {size} for this model")
    order = np.lexsort((np.arange(size), -counts.sum(axis=0), vocabulary.dead, ~must))
    return np.sort(order[:vocab_size])


def unigram_scores(proto: ModelProto, counts: np.ndarray, kept: np.ndarray) -> dict[int, float]:
    """Log-probabilities of the normal pieces kept, from their counts (add one half), by old id.

    The counts are those of the full model's segmentation: one step of the EM algorithm that unigram models
    are trained with, from the full model as its start.
    """
    normal = [int(i) for i in kept if proto.pieces[int(i)].type == Piece.NORMAL]
    weights = counts.sum(axis=0)[normal] + 0.5
    return dict(zip(normal, np.log(weights / weights.sum()).tolist(), strict=True))


def pruned_model(proto: ModelProto, kept: np.ndarray, scores: dict[int, float] | None = None) -> ModelProto:
    """The model with the pieces ``kept`` only, in their order; ``scores`` by old id replaces theirs."""
    new = ModelProto()
    new.CopyFrom(proto)
    del new.pieces[:]
    for i in kept.tolist():
        piece = new.pieces.add()
        piece.CopyFrom(proto.pieces[i])
        if scores and i in scores:
            piece.score = scores[i]
    new.trainer_spec.vocab_size = len(kept)
    new_id = {old: new_id for new_id, old in enumerate(kept.tolist())}
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        old = getattr(proto.trainer_spec, name)
        if old >= 0:
            setattr(new.trainer_spec, name, new_id.get(old, -1))
    new.DiscardUnknownFields()  # self-test data, which this schema lacks: segmentations of the full model
    return new


class SentencePieceModel:
    """A SentencePiece model to compress (:class:`compress.Compressible`).

    Args:
        data: the serialized model.
        drop_fillers: let user-defined fillers that never occur go.

    Raises:
        ValueError: it is no such model, or neither BPE nor unigram.
    """

    #: What OUTPUT_hf holds.
    HF_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")

    def __init__(self, data: bytes, drop_fillers: bool = False, name: str | None = None) -> None:
        self.data, self.drop_fillers = data, drop_fillers
        self.encoder, self.proto = NativeEncoder(name, model_proto=data), read_proto(data)
        self.is_unigram = self.proto.trainer_spec.model_type == UNIGRAM
        self.sha256 = sha256(data)

    def token_bytes(self) -> np.ndarray:
        """How many bytes each id stands for, int32 [vocabulary]."""
        return lengths(sentencepiece_texts(self.encoder.processor))

    def vocabulary(self, counts: np.ndarray) -> Vocabulary:
        """What is to be chosen from."""
        return describe(self.proto, self.encoder, self.drop_fillers, counts)

    def choose(self, vocabulary: Vocabulary, counts: np.ndarray, vocab_size: int) -> np.ndarray:
        """Of a BPE model by leaf removal, of a unigram model the most frequent."""
        return (choose_unigram if self.is_unigram else choose)(vocabulary, counts, vocab_size)

    def compressed(self, kept: np.ndarray, counts: np.ndarray) -> SentencePieceModel:
        """The model of the pieces ``kept``."""
        scores = unigram_scores(self.proto, counts, kept) if self.is_unigram else None
        return SentencePieceModel(pruned_model(self.proto, kept, scores).SerializeToString())

    def unreachable(self) -> list[str]:
        """Normal pieces of a BPE model that no text can produce."""
        if self.is_unigram:
            return []
        dead = np.flatnonzero(self.encoder.derivations()[:, 0] == -2)
        return [self.encoder.processor.id_to_piece(int(i)) for i in dead]

    def round_trip(self, texts: list[str]) -> tuple[int, int]:
        """Tokens of the texts, and the number of texts that do not come back exactly."""
        documents = self.encoder.encode_batch(texts)
        back = (self.encoder.processor.decode(ids.tolist()) for ids in documents)
        failed = sum(came != text for came, text in zip(back, texts, strict=True))
        return sum(map(len, documents)), failed

    def refuse_others(self, output: str) -> None:
        """Raises if OUTPUT_hf/ holds another tokenizer's files."""
        refuse_others(Path(f"{output}_hf"), self.HF_FILES)

    def write(self, output: str) -> dict[str, Any]:
        """OUTPUT.model, OUTPUT.vocab and OUTPUT_hf/; or the reason why there is no folder."""
        processor = self.encoder.processor
        lines = [f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in range(len(processor))]
        write_aside(Path(f"{output}.vocab"), "".join(lines).encode())
        reason = self._write_folder(Path(f"{output}_hf"))
        write_aside(Path(f"{output}.model"), self.data)
        return {"no_hf_folder": reason} if reason else {}

    def _write_folder(self, folder: Path) -> str | None:
        try:
            files = hf_export.folder_files(self.encoder, self.data)
        except hf_export.NotExpressible as error:
            if folder.exists():
                raise CompressionError(
                    f"{folder} is of another model, and this one cannot be described for transformers "
                    f"({error}); remove it"
                ) from error
            return str(error)
        write_folder(folder, files)
        return None
