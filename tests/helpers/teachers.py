"""A teacher and a student of two vocabularies, for tests: tokenizers, a dataset of each, and their flags."""

from pathlib import Path

import numpy as np

from megatron_ext.tokenizer.build import SentencePieceTokenizer
from megatron_ext.tokenizer.compress_sentencepiece import SentencePieceModel
from tests.unit.data import corpora

#: A model that differs from tests/functional/test_run.py's in every dimension; wide weights make it certain.
TEACHER = dict(
    num_layers=4, hidden_size=96, ffn_hidden_size=160, num_attention_heads=6, group_query_attention=True,
    num_query_groups=2, series_activation_order=None, augmented_shortcuts=None,
    augmented_shortcut_reduction=None, pangu_init=None, untie_embeddings_and_output_weights=False,
    init_method_std=0.15,
)  # fmt: skip


def compact_tokenizer(full: Path, path: Path) -> Path:
    """A SentencePiece model without every second piece that is longer than a character."""
    model = SentencePieceModel(full.read_bytes())
    long = [i for i, piece in enumerate(model.proto.pieces) if piece.type == 1 and len(piece.piece) > 1]
    kept = np.setdiff1d(np.arange(len(model.proto.pieces)), long[1::2])
    path.write_bytes(model.compressed(kept, np.ones((1, len(model.proto.pieces)))).data)
    return path


def of_two_vocabularies(folder: Path) -> tuple[dict, dict]:
    """Flags of data and tokenizer for the teacher, and for a student whose vocabulary is a part of it."""
    full = corpora.train_tokenizer(folder)
    flags = []
    for name, path in (("full", full), ("compact", compact_tokenizer(full, folder / "compact.model"))):
        corpora.upstream(folder / name, corpora.documents(60, seed=3), path)
        tokenizer = dict(tokenizer_type="SentencePieceTokenizer", tokenizer_model=path, vocab_size=None)
        flags.append(tokenizer | dict(mock_data=None, data_path=folder / name, split="1,0,0"))
    sizes = [SentencePieceTokenizer(each["tokenizer_model"]).vocab_size for each in flags]
    assert sizes[1] < sizes[0]
    return flags[0], flags[1]
