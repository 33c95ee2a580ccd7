"""A .tiktoken file as Hugging Face's ``tokenizer.json``, with the same ids.

The file lists pieces with their ranks, and nothing else: how text is cut before it is merged, and which
special tokens there are, stands in the program that goes with it. tiktoken takes a part that is a piece
whole, and else always merges the adjacent pair whose concatenation has the lowest rank. Hence a piece comes
from one pair alone (see :mod:`bpe_json`), which merging its bytes shows.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.common.files import sha256
from megatron_ext.tokenizer.bits_per_byte import BYTE_LEVEL_ALPHABET
from megatron_ext.tokenizer.bpe_json import NEVER, merge
from megatron_ext.tokenizer.compress import CompressionError
from megatron_ext.tokenizer.hf_folder import HuggingFaceFolder

#: What Qwen and Llama 3 have in common: before runs of digits, and after them.
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


@dataclass(frozen=True)
class Family:
    """What a .tiktoken file does not say.

    Attributes:
        pattern: regular expression of the parts that text is cut into.
        special: special tokens; their ids follow the last rank.
        eos: the one that ends a document.
        nfc: whether text is normalized to NFC first.
    """

    pattern: str
    special: tuple[str, ...]
    eos: str | None
    nfc: bool = False


def _reserved(first: int, end: int) -> tuple[str, ...]:
    return tuple(f"<|reserved_special_token_{i}|>" for i in range(first, end))


_LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>")
_HEADER = ("<|start_header_id|>", "<|end_header_id|>")
_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: Sources: tiktoken's openai_public.py (gpt2); QwenLM/Qwen's tokenization_qwen.py; meta-llama/llama3's
#: llama/tokenizer.py and, for 3.1 to 3.3, meta-llama/llama-models' models/llama3/tokenizer.py.
FAMILIES = {
    "gpt2": Family(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", _CHAT[:1], _CHAT[0]
    ),
    "qwen": Family(
        rf"{_HEAD}\p{{N}}{_TAIL}", (*_CHAT, *(f"<|extra_{i}|>" for i in range(205))), _CHAT[0], nfc=True
    ),
    "qwen2": Family(rf"{_HEAD}\p{{N}}{_TAIL}", _CHAT, _CHAT[0], nfc=True),
    "llama3": Family(
        rf"{_HEAD}\p{{N}}{{1,3}}{_TAIL}",
        (*_LLAMA_3, *_reserved(0, 4), *_HEADER, *_reserved(4, 5), "<|eot_id|>", *_reserved(5, 251)),
        _LLAMA_3[1],
    ),
    "llama3.1": Family(
        rf"{_HEAD}\p{{N}}{{1,3}}{_TAIL}",
        (
            *(*_LLAMA_3, *_reserved(0, 2), "<|finetune_right_pad_id|>", "<|step_id|>", *_HEADER),
            *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>", *_reserved(2, 246)),
        ),
        _LLAMA_3[1],
    ),
}


def is_tiktoken(data: bytes) -> bool:
    """Whether a file begins as a .tiktoken file does (Llama 3's is called tokenizer.model)."""
    return _LINE.match(data) is not None


def family_of(name: str | None, pattern: str | None, special: Sequence[str]) -> Family:
    """What the flags say; of special tokens that are typed, the first ends a document.

    Raises:
        CompressionError: they say nothing.
    """
    if name is not None:
        return FAMILIES[name]
    if pattern is None:
        raise CompressionError(
            "a .tiktoken file does not say how text is cut: give --tiktoken-family "
            f"({', '.join(FAMILIES)}), or --split-pattern and --special-tokens"
        )
    return Family(pattern, tuple(special), special[0] if special else None)


def as_folder(path: Path, data: bytes, family: Family) -> HuggingFaceFolder:
    """The Hugging Face folder of the same ids.

    Raises:
        CompressionError: the file is damaged.
    """
    try:
        ranks = _ranks(data)
    except CompressionError as error:
        raise CompressionError(f"{path}: {error}") from error
    described = json.dumps(_description(ranks, family), ensure_ascii=False).encode()
    config = {"eos_token": family.eos} if family.eos else {}
    identity = sha256(data + repr(family).encode())
    return HuggingFaceFolder.alone(str(path), described, identity, config)


def _ranks(data: bytes) -> dict[bytes, int]:
    """Piece -> rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            spelled, rank = line.split()
            piece = base64.b64decode(spelled, validate=True)
            if ranks.setdefault(piece, int(rank)) != int(rank) or not piece:
                raise ValueError
        except (ValueError, binascii.Error):
            raise CompressionError(
                f"line {number} is not a piece in base64 and its rank: {line[:60]!r}"
            ) from None
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CompressionError(
            f"there is no piece for byte {missing[0]:#04x}: cut short, or no .tiktoken file"
        )
    return ranks


def _description(ranks: dict[bytes, int], family: Family) -> dict[str, Any]:
    letter = {byte: character for character, byte in BYTE_LEVEL_ALPHABET.items()}
    spelled = {piece: "".join(letter[byte] for byte in piece) for piece in ranks}
    ordered = sorted(ranks, key=ranks.__getitem__)
    pairs = [pair for piece in ordered if len(piece) > 1 and (pair := _pair(piece, ranks))]
    cut = {"type": "Split", "pattern": {"Regex": family.pattern}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = max(ranks.values()) + 1
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": first + i, "content": t} | plain for i, t in enumerate(family.special)],
        "normalizer": {"type": "NFC"} if family.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, bytes_]},
        "post_processor": None,
        "decoder": bytes_ | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **{"fuse_unk": False, "byte_fallback": False, "ignore_merges": True},
            "vocab": {spelled[piece]: ranks[piece] for piece in ordered},
            "merges": [[spelled[left], spelled[right]] for left, right in pairs],
        },
    }


def _pair(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The pair that a piece comes from; None if it is only ever taken whole."""
    symbols = [piece[i : i + 1] for i in range(len(piece))]
    left, last = merge(symbols, lambda left, right: ranks.get(left + right, NEVER))
    return last if len(left) == 1 else None
