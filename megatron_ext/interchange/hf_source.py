"""A Hugging Face folder: ``config.json`` and safetensors files, in one piece or several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint.integrity import CHECKSUMS, damage
from megatron_ext.interchange import tokenizer_files
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.hf_config import read_model
from megatron_ext.interchange.hf_tokenizer import special_ids
from megatron_ext.interchange.json_file import read_object
from megatron_ext.interchange.mapping import Entry, architecture_named
from megatron_ext.interchange.source import Source
from megatron_ext.interchange.weight_files import DERIVED, WeightFiles

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


class HuggingFaceSource(Source):
    """Tensors are views of memory-mapped files; of several parts one is open at a time."""

    kind = "hf"

    def __init__(self, path: Path, allow_pickle: bool = False, tokenizer_model: str | Path | None = None):
        self.path = path
        if (path / CHECKSUMS).exists() and (problem := damage(path)):
            raise InterchangeError(problem)
        config = read_object(path / "config.json")
        self._files = WeightFiles(path, allow_pickle)
        try:
            architecture = architecture_named(str(config.get("model_type")), config.get("architectures"))
            self.model, self.dtype = read_model(config), self._files.dtype
        except InterchangeError as error:
            raise InterchangeError(f"{path / 'config.json'}: {error}") from None
        self._require_layers()
        self._head = next(entry for entry in architecture.entries if entry.ours == _HEAD).theirs[0]
        self._entries = {entry.ours: entry for entry in architecture.entries_of(self.model)}
        self._find_tied_embedding()
        self._require_names()
        self.tokenizer = self._find_tokenizer(tokenizer_model)
        self.notes = tuple(self._notes(config))
        self.origin = f"a {architecture.class_name}"

    def _require_layers(self) -> None:
        """Raise if the configuration asks for more layers than there are tensors, before any is named."""
        if self.model.num_layers > len(self._files.sizes):
            raise InterchangeError(
                f"{self.path}: config.json says {self.model.num_layers} layers, but the files hold "
                f"{len(self._files.sizes)} tensors"
            )

    def _find_tied_embedding(self) -> None:
        """Read the one matrix of a tied model from the head, where only the head was written."""
        embedding = self._entries[_EMBEDDING].theirs[0]
        if self.model.tied and embedding not in self._files.sizes and self._head in self._files.sizes:
            self._entries[_EMBEDDING] = Entry(_EMBEDDING, (self._head,))

    def _require_names(self) -> None:
        """Raise unless the files hold the tensors of the configuration, in their sizes, and no others."""
        sizes = self.model.without_padding.parameters()
        expected = {
            name: size
            for entry in self._entries.values()
            for name, size in zip(
                entry.theirs, entry.layout.sizes(sizes[entry.ours], self.model), strict=True
            )
        }
        there = self._files.sizes
        problems = [f"{name} is missing{self._why_missing(name)}" for name in expected if name not in there]
        problems += [
            f"{name} is {list(there[name])}, config.json says {list(size)}"
            for name, size in expected.items()
            if name in there and there[name] != size
        ]
        problems += [
            f"{name} is not part of this architecture"
            for name in there
            if name not in expected and not name.endswith(DERIVED) and not self._is_tied_head(name)
        ]
        if problems:
            more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise InterchangeError(f"{self.path}: {'; '.join(problems[:4])}{more}")

    def _why_missing(self, name: str) -> str:
        return " (of a tied model, config.json says tie_word_embeddings)" if name == self._head else ""

    def _is_tied_head(self, name: str) -> bool:
        """Whether a tensor is the head that a tied model shares with its embedding, written twice."""
        if not self.model.tied or name != self._head:
            return False
        embedding = self._entries[_EMBEDDING].theirs[0]
        if embedding not in self._files.sizes:
            return True  # it is the embedding
        one, other = (self._files.get(each).to(self._files.dtype) for each in (name, embedding))
        if torch.equal(one, other):
            return True
        raise InterchangeError(f"{self.path}: config.json ties {name} to {embedding}, but they differ")

    def _find_tokenizer(self, given: str | Path | None) -> tokenizer_files.TokenizerFiles | None:
        own = tokenizer_files.of_folder(self.path)
        tokenizer = own if given is None else tokenizer_files.of_path(given)
        if own and tokenizer and own.sha256 != tokenizer.sha256:
            raise InterchangeError(
                f"--tokenizer-model {given} is not the tokenizer in {self.path}: the model's ids mean "
                "other pieces"
            )
        if tokenizer:
            tokenizer_files.require_fit(tokenizer, self.model.vocab_size, self.path)
        return tokenizer

    def _notes(self, config: dict[str, Any]) -> Iterator[str]:
        """Fewer positions than stated; the end of a text where it is another id than the tokenizer's."""
        stated, positions = config.get("max_position_embeddings"), self.model.max_position_embeddings
        if isinstance(stated, int) and stated > positions:
            yield (
                f"{self.path / 'config.json'}: the model has {positions} positions here, its sliding window, "
                f"and not {stated}: its attention is full up to there"
            )
        eos = special_ids(self.tokenizer).eos if self.tokenizer else None
        for name, said in (
            ("config.json", config),
            ("generation_config.json", read_object(self.path / "generation_config.json", missing={})),
        ):
            told = said.get("eos_token_id")
            if None not in (told, eos) and eos not in (told if isinstance(told, list) else [told]):
                yield (
                    f"{self.path / name} ends texts with id {told}, the tokenizer with {eos}: that of the "
                    "tokenizer ends documents here"
                )

    def _read(self, key: str) -> Tensor:
        entry = self._entries[key]
        return entry.layout.join([self._files.get(name) for name in entry.theirs], self.model)
