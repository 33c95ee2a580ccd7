"""A SentencePiece BPE model as a Hugging Face tokenizer (``tokenizer.json``).

The merges are those the native encoder derives: one for each producible piece, in the order of the scores.
It gives sentencepiece's ids except where two merges have the same score (Hugging Face breaks the tie by rank,
sentencepiece by place in the text) and where sentencepiece changes blanks or characters before it merges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.tokenizer.encoder import NativeEncoder

if TYPE_CHECKING:
    import tokenizers


def merges_of(encoder: NativeEncoder) -> list[tuple[str, str]]:
    """(left, right) of each producible piece's last merge, best score first.

    Merges of characters that are no pieces cannot be written down for Hugging Face and are left out.
    """
    processor = encoder.processor
    derivations = encoder.derivations()
    merged = [i for i, (left, right) in enumerate(derivations.tolist()) if left >= 0 and right >= 0]
    merged.sort(key=lambda i: -processor.get_score(i))
    return [tuple(processor.id_to_piece(int(part)) for part in derivations[i]) for i in merged]


def fast_tokenizer(encoder: NativeEncoder) -> tokenizers.Tokenizer | None:
    """The equivalent ``tokenizers.Tokenizer``; None without that package, or for a model that is neither a
    BPE one that the native encoder reads nor a unigram one.
    """
    try:
        import tokenizers
        from tokenizers import decoders, normalizers
    except ImportError:
        return None
    processor = encoder.processor
    byte_fallback = any(processor.is_byte(i) for i in range(encoder.vocab_size))
    model = (_bpe if encoder.native else _unigram)(encoder, byte_fallback)
    if model is None:
        return None
    tokenizer = tokenizers.Tokenizer(model)
    prefix = encoder.adds_dummy_prefix
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [i for i in range(encoder.vocab_size) if processor.is_control(i) or processor.is_unknown(i)]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(processor.id_to_piece(i), special=True) for i in special]
    )
    return tokenizer


def _bpe(encoder: NativeEncoder, byte_fallback: bool) -> tokenizers.models.BPE:
    from tokenizers.models import BPE

    processor = encoder.processor
    vocab = {processor.id_to_piece(i): i for i in range(encoder.vocab_size)}
    unknown = processor.id_to_piece(processor.unk_id())
    return BPE(vocab, merges_of(encoder), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)


def _unigram(encoder: NativeEncoder, byte_fallback: bool) -> tokenizers.models.Unigram | None:
    """Pieces with their scores; None for a model of another kind, or whose normalizer rewrites characters."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
    from tokenizers.models import Unigram

    processor = encoder.processor
    proto = ModelProto.FromString(processor.serialized_model_proto())
    unigram = proto.trainer_spec.model_type == TrainerSpec.UNIGRAM
    if not unigram or proto.normalizer_spec.precompiled_charsmap:
        return None
    # A user-defined piece always wins in sentencepiece; its score here is above what its parts can reach.
    scores = [
        (piece.piece, 0.0 if piece.type == piece.USER_DEFINED else piece.score) for piece in proto.pieces
    ]
    return Unigram(scores, processor.unk_id(), byte_fallback)


def write_folder(encoder: NativeEncoder, model_proto: bytes, folder: Path) -> bool:
    """Writes tokenizer.model, tokenizer.json and tokenizer_config.json;
    False if only the first can be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_proto)
    tokenizer = fast_tokenizer(encoder)
    if tokenizer is None:
        return False
    tokenizer.save(str(folder / "tokenizer.json"))
    processor = encoder.processor
    names = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    config = {f"{name}_token": processor.id_to_piece(i) for name, i in names.items() if i >= 0}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return True
