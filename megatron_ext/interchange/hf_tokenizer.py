"""The tokenizer of an exported folder, and the ids that generation must know."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.json_file import read_object
from megatron_ext.interchange.tokenizer_files import TokenizerFiles, is_code, known_tokens


@dataclass(frozen=True)
class SpecialIds:
    """Ids with a meaning of their own; None where the tokenizer has none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    has_tokenizer: bool = False

    def of_config(self) -> dict[str, Any]:
        """For ``config.json``; None is said too, for transformers has defaults of its own."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}

    def of_generation(self) -> dict[str, Any]:
        """For ``generation_config.json``; a batch is padded with the end of a text where nothing else is."""
        pad = self.eos if self.pad is None else self.pad
        ids = {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": pad}
        return {"do_sample": False} | {name: value for name, value in ids.items() if value is not None}


def write_tokenizer(tokenizer: TokenizerFiles | None, folder: Path) -> SpecialIds:
    """Put the tokenizer into ``folder`` as transformers loads it; the ids that it says are special."""
    if tokenizer is None or tokenizer.model is None:
        return SpecialIds()
    if tokenizer.for_transformers:
        for file in (*tokenizer.files, *tokenizer.companions):
            shutil.copyfile(file, folder / file.name)
    else:
        _describe(tokenizer.model, folder)
    return special_ids(tokenizer)


def _describe(model: Path, folder: Path) -> None:
    """A SentencePiece model, described for transformers."""
    from megatron_ext.tokenizer.encoder import NativeEncoder
    from megatron_ext.tokenizer.hf_export import NotExpressible, folder_files

    proto = model.read_bytes()
    try:
        files = folder_files(NativeEncoder(model_proto=proto), proto)
    except NotExpressible as error:
        raise InterchangeError(f"{model} cannot be described for transformers: {error}") from error
    for name, content in files.items():
        (folder / name).write_bytes(content)


def require_same_tokenizer(tokenizer: TokenizerFiles | None, folder: Path, model_type: str) -> None:
    """Raise InterchangeError unless transformers reads the tokenizer of a finished folder as it was meant.

    ``config.json`` takes part in that: beside some values of ``model_type`` transformers takes a class of
    its own, which replaces what ``tokenizer.json`` says of the cutting of texts.
    """
    if tokenizer is None or tokenizer.model is None or is_code(folder):
        return
    back = _as_transformers_reads(folder, known=model_type != "pangu_pi")
    if tokenizer.for_transformers:
        meant = _as_transformers_reads(tokenizer.folder)
        difference = None if _backend(back) == _backend(meant) else f"it came as {type(meant).__name__}"
    else:
        difference = _difference(tokenizer.model, back)
    if difference:
        raise InterchangeError(
            f"beside a model of type {model_type} transformers reads the tokenizer {tokenizer.model} as its "
            f"own {type(back).__name__}, which encodes otherwise ({difference}); --hf-architecture pangu_pi "
            "holds every model, and leaves the tokenizer as it is"
        )


def _as_transformers_reads(folder: Path, known: bool = True) -> Any:
    """The tokenizer of a folder; ``known``: transformers knows the model that lies there."""
    from transformers import AutoTokenizer, PretrainedConfig

    config = {} if known else {"config": PretrainedConfig()}
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, **config
        )
    except Exception as error:  # transformers raises whatever its parsers raise
        raise InterchangeError(f"{folder}: transformers cannot load its tokenizer: {error}") from error


def _backend(tokenizer: Any) -> str:
    """What decides a tokenizer's ids: its backend, or where there is none its class."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(tokenizer).__name__ if backend is None else backend.to_str()


def _difference(model: Path, back: Any) -> str | None:
    """A text that transformers encodes otherwise than a SentencePiece model does; None if there is none."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    from megatron_ext.tokenizer.build import SentencePieceTokenizer
    from megatron_ext.tokenizer.hf_check import first_difference

    return first_difference(
        SentencePieceTokenizer(model).processor,
        ModelProto.FromString(model.read_bytes()),
        back.backend_tokenizer,
    )


def special_ids(tokenizer: TokenizerFiles) -> SpecialIds:
    """The ids that a tokenizer says are special."""
    if tokenizer.model is None:
        return SpecialIds()
    if tokenizer.kind == "SentencePieceTokenizer":
        from megatron_ext.tokenizer.build import SentencePieceTokenizer

        built = SentencePieceTokenizer(tokenizer.model)
        bos, eos, pad = (token if token >= 0 else None for token in (built.bos, built.eos, built.pad))
        return SpecialIds(bos, eos, pad, has_tokenizer=True)
    folder = tokenizer.model
    names, known = read_object(folder / "tokenizer_config.json", missing={}), known_tokens(folder)
    if "added_tokens_decoder" not in names:  # transformers looks at the older file only then
        names |= read_object(folder / "special_tokens_map.json", missing={})

    def id_of(role: str) -> int | None:
        token = names.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        return known.get(token) if isinstance(token, str) else None

    return SpecialIds(id_of("bos"), id_of("eos"), id_of("pad"), has_tokenizer=True)
