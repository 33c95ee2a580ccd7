"""Tokenizers by Megatron-LM's names, with the few members that training and data need.

Ids equal those of Megatron-LM 0.16's own tokenizers (megatron.core.tokenizers), which are thin
wrappers of the same libraries; these classes import neither torch nor Megatron-Core, so that
tools start at once.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.common.errors import first_line
from megatron_ext.common.files import sha256
from megatron_ext.config.data import TokenizerConfig
from megatron_ext.tokenizer.bits_per_byte import (
    huggingface_size,
    huggingface_texts,
    lengths,
    sentencepiece_texts,
)
from megatron_ext.tokenizer.checked import refusals

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer", "NullTokenizer")
#: The files of a Hugging Face folder that decide ids; their content is the tokenizer's identity.
HUGGINGFACE_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class TokenizerError(ValueError):
    """The tokenizer asked for cannot be built; the message names the file and the flag."""


class Tokenizer:
    """What every tokenizer here has.

    Attributes:
        vocab_size: number of ids, without padding.
        eod: id that ends a document. bos, eos, pad: ids, -1 where the tokenizer has none.
        sha256: of the files that decide the ids; stored in checkpoints and dataset manifests.
    """

    vocab_size: int
    eod: int
    bos: int = -1
    eos: int = -1
    pad: int = -1
    sha256: str

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it."""
        raise NotImplementedError

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text that ids stand for."""
        raise NotImplementedError

    def token_texts(self) -> list[bytes]:
        """The bytes that each id stands for; empty for special tokens.

        Raises:
            ValueError: ids stand for no text (NullTokenizer).
        """
        raise NotImplementedError

    def special_tokens(self) -> dict[str, int]:
        """Name -> id of what stands for no text and has a meaning of its own, such as ``</s>``."""
        return {}

    def token_bytes(self) -> np.ndarray:
        """How many bytes each id stands for, int32 [vocab_size]; 0 for special tokens."""
        return lengths(self.token_texts())

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What Megatron-Core puts into the name of a dataset's index files."""
        return OrderedDict({"class": type(self).__name__, "sha256": self.sha256})


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; end of document is the model's ``</s>``, as in Megatron-LM.

    ``Llama2Tokenizer`` and ``GPTSentencePieceTokenizer`` are the same since Megatron-LM 0.16: no
    ``<s>`` is put in front of a text.
    """

    def __init__(self, model_file: str | Path) -> None:
        import sentencepiece

        proto = _read(model_file)
        sentencepiece.set_min_log_level(2)  # without it each load warns of unused pieces
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        # ValueError: its message is no UTF-8, where it quotes the file.
        except (RuntimeError, OSError, ValueError) as error:
            raise TokenizerError(
                f"--tokenizer-model {model_file}: not a SentencePiece model ({first_line(error)})"
            ) from error
        self.model_file = str(model_file)
        self.sha256 = sha256(proto)
        self.vocab_size = self.processor.get_piece_size()
        self.bos, self.eos, self.pad = (
            self.processor.bos_id(),
            self.processor.eos_id(),
            self.processor.pad_id(),
        )
        self.eod = self.eos
        if self.eod < 0:
            raise TokenizerError(
                f"--tokenizer-model {model_file}: the model has no </s> piece to end documents with"
            )

    def tokenize(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(i) for i in ids])

    def token_texts(self) -> list[bytes]:
        return sentencepiece_texts(self.processor)

    def special_tokens(self) -> dict[str, int]:
        ids = filter(self.processor.is_control, range(self.vocab_size))
        return {self.processor.id_to_piece(i): i for i in ids}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer from a local folder in Hugging Face's layout; nothing is ever downloaded.

    Code of the folder runs only with ``--trust-remote-code``.
    """

    def __init__(
        self,
        folder: str | Path,
        use_fast: bool = False,
        include_special_tokens: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        if not Path(folder).is_dir():
            raise TokenizerError(
                f"--tokenizer-model {folder}: HuggingFaceTokenizer needs a local folder with the "
                "tokenizer's files (tokenizer.json or tokenizer.model); nothing is downloaded"
            )
        if not trust_remote_code:
            require_no_code(Path(folder))
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise TokenizerError("HuggingFaceTokenizer needs: pip install transformers") from error
        try:
            with refusals("transformers cannot load it"):
                self.tokenizer = AutoTokenizer.from_pretrained(
                    str(folder),
                    use_fast=use_fast,
                    trust_remote_code=trust_remote_code,
                    local_files_only=True,
                )
        except ValueError as error:
            reason = _fault_of_description(Path(folder)) or error
            raise TokenizerError(f"--tokenizer-model {folder}: {reason}") from error
        model = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        if dropout := getattr(model, "dropout", None):
            raise TokenizerError(
                f"--tokenizer-model {folder}: tokenizer.json has a dropout of {dropout}, so that a text has "
                "other ids each time; set it to null"
            )
        self.include_special_tokens = include_special_tokens
        self.sha256 = folder_sha256(Path(folder))
        self.vocab_size = huggingface_size(self.tokenizer)
        self.bos, self.eos, self.pad = (
            -1 if token_id is None else token_id
            for token_id in (
                self.tokenizer.bos_token_id,
                self.tokenizer.eos_token_id,
                self.tokenizer.pad_token_id,
            )
        )
        if self.eos < 0 and self.tokenizer.sep_token_id is not None:
            self.eos = self.tokenizer.sep_token_id
        self.eod = self.eos
        if self.eod < 0:
            raise TokenizerError(f"--tokenizer-model {folder}: has no eos_token to end documents with")

    def tokenize(self, text: str) -> list[int]:
        # Not through the tokens' names, as Megatron-LM does it: one that strips blanks beside it has no id by
        # the name that it then gets.
        special = self.include_special_tokens
        return self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_texts(self) -> list[bytes]:
        return huggingface_texts(self.tokenizer)

    def special_tokens(self) -> dict[str, int]:
        tokens = self.tokenizer.added_tokens_decoder.items()
        return {token.content: number for number, token in tokens if token.special}


class NullTokenizer(Tokenizer):
    """Ids are numbers written in the text; ``vocab_size`` N gives ids 0..N-1 and N ends a document."""

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise TokenizerError(f"--vocab-size {vocab_size}: must be at least 1")
        self.eod = vocab_size
        self.vocab_size = vocab_size + 1
        self.sha256 = null_sha256(vocab_size)

    def tokenize(self, text: str) -> list[int]:
        """The numbers in a text; raises TokenizerError for a word that is not an id."""
        ids = []
        for word in text.split():
            if not (word.isascii() and word.isdigit() and len(word) < 20 and int(word) < self.vocab_size):
                raise TokenizerError(
                    f"{word[:40]!r} is not a number from 0 to {self.vocab_size - 1}: there is no tokenizer "
                    "(NullTokenizer), so a text is the numbers of its tokens"
                )
            ids.append(int(word))
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def token_texts(self) -> list[bytes]:
        raise ValueError("NullTokenizer has no pieces: its ids are numbers")

    def token_bytes(self) -> np.ndarray:
        """All 0: numbers stand for no text, so there are no bits per byte."""
        return np.zeros(self.vocab_size, dtype=np.int32)


def build_tokenizer(flags: TokenizerConfig) -> Tokenizer:
    """The tokenizer that ``--tokenizer-type`` and its neighbours name.

    Raises:
        TokenizerError: unknown type, missing flag, missing or broken file.
    """
    kind = flags.tokenizer_type
    if kind == "NullTokenizer":
        if flags.vocab_size is None:
            raise TokenizerError("--tokenizer-type NullTokenizer needs --vocab-size")
        return NullTokenizer(flags.vocab_size)
    if kind not in TOKENIZER_TYPES:
        raise TokenizerError(f"--tokenizer-type {kind} is not supported; use {', '.join(TOKENIZER_TYPES)}")
    if not flags.tokenizer_model:
        raise TokenizerError(f"--tokenizer-type {kind} needs --tokenizer-model")
    if kind in SENTENCEPIECE_TYPES:
        return SentencePieceTokenizer(flags.tokenizer_model)
    return HuggingFaceTokenizer(
        flags.tokenizer_model,
        flags.tokenizer_hf_use_fast,
        flags.tokenizer_hf_include_special_tokens,
        flags.trust_remote_code,
    )


def flags_of(path: str | Path) -> TokenizerConfig:
    """The flags of the tokenizer in a SentencePiece file or a Hugging Face folder."""
    kind = "HuggingFaceTokenizer" if Path(path).is_dir() else "SentencePieceTokenizer"
    return TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(path))


def _read(model_file: str | Path) -> bytes:
    path = Path(model_file)
    if not path.is_file():
        hint = " (it is a folder: --tokenizer-type HuggingFaceTokenizer?)" if path.is_dir() else ""
        raise TokenizerError(f"--tokenizer-model {model_file}: there is no such file{hint}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"--tokenizer-model {model_file}: {error.strerror}") from error
    if not content:
        raise TokenizerError(f"--tokenizer-model {model_file}: the file is empty")
    return content


def require_no_code(folder: Path) -> None:
    """Raise TokenizerError if a Hugging Face folder says that its tokenizer is Python code."""
    for name in ("tokenizer_config.json", "config.json"):
        try:
            config = json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise TokenizerError(f"--tokenizer-model {folder}: {name}: {first_line(error)}") from error
        code = config.get("auto_map") if isinstance(config, dict) else None
        # In config.json, a model may come with code and its tokenizer without.
        if code and (name == "tokenizer_config.json" or (isinstance(code, dict) and "AutoTokenizer" in code)):
            raise TokenizerError(
                f"--tokenizer-model {folder}: {name} names Python code (auto_map), which runs only if you "
                "trust it and give --trust-remote-code"
            )


def _fault_of_description(folder: Path) -> str | None:
    """Why ``tokenizer.json`` describes no tokenizer, if it is as simple as that."""
    try:
        content = json.loads((folder / "tokenizer.json").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        return f"tokenizer.json: not JSON, or cut short ({first_line(error)})"
    return None if describes_a_model(content) else NO_MODEL


#: Of a tokenizer.json.
NO_MODEL = "tokenizer.json describes no model"


def describes_a_model(content: Any) -> bool:
    """Whether JSON is as simple as a tokenizer.json must be."""
    return isinstance(content, dict) and isinstance(content.get("model"), dict)


def null_sha256(vocab_size: int) -> str:
    """What stands for the sha256 of a NullTokenizer's files."""
    return sha256(f"NullTokenizer {vocab_size}")


def folder_sha256(folder: Path) -> str:
    """sha256 of the files in a Hugging Face folder that decide the ids."""
    digest = hashlib.sha256()
    for name in HUGGINGFACE_FILES:
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
