"""A torch_dist checkpoint, ours or Megatron-LM's, read tensor by tensor without a process group."""

from __future__ import annotations

import io
import logging
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_ext.checkpoint import CheckpointError
from megatron_ext.checkpoint.found import find
from megatron_ext.checkpoint.integrity import damage
from megatron_ext.checkpoint.reader import read
from megatron_ext.checkpoint.safe import load_object
from megatron_ext.config.model_function import Saved
from megatron_ext.interchange import tokenizer_files
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.llama import of_saved
from megatron_ext.interchange.source import Source
from megatron_ext.interchange.weight_files import widest
from megatron_ext.models.layer_specs import CHECKPOINT_NAMES

logger = logging.getLogger(__name__)

_LAYERS = "decoder.layers."
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
#: Megatron-LM's other names of the two norms: it has one for each of its two layer specs.
_NORMS = {f"{saved}weight": f"{module}weight" for module, saved in CHECKPOINT_NAMES.items()}


class MegatronSource(Source):
    """One checkpoint, whatever layout saved it."""

    kind = "megatron"
    saved: Saved

    def __init__(self, folder: Path, tokenizer_model: str | Path | None = None):
        self.path = folder
        try:
            if problem := damage(folder):
                raise InterchangeError(problem)
            common, self._metadata = read(folder)
        except CheckpointError as error:
            raise InterchangeError(str(error)) from error
        if common.get("args") is None:
            raise InterchangeError(f"{folder / 'common.pt'} has no args, which say what the model is")
        self.saved = common["args"]
        self.iteration = int(common.get("iteration", 0))
        saved_sha256 = common.get("pangu_pro", {}).get("tokenizer_sha256")
        self.tokenizer = self._find_tokenizer(tokenizer_model, saved_sha256)
        vocab_size = self._vocab_size()
        try:
            self.model = of_saved(self.saved, vocab_size)
        except InterchangeError as error:
            raise InterchangeError(f"the args in {folder / 'common.pt'}: {error}") from error
        except (KeyError, TypeError) as error:
            raise InterchangeError(
                f"the args in {folder / 'common.pt'} do not say what it is (no {error})"
            ) from error
        self._require_layers(self.model.num_layers)
        self.dtype = self._find_dtype()
        if self.tokenizer:
            tokenizer_files.require_fit(self.tokenizer, self.model.vocab_size, folder)
        self.origin = f"a checkpoint of iteration {self.iteration}"

    def _find_tokenizer(
        self, given: str | Path | None, saved_sha256: str | None
    ) -> tokenizer_files.TokenizerFiles | None:
        """The tokenizer given, or the one that the args name if it is still the same."""
        if given is None:
            found = tokenizer_files.of_saved(self.saved)
            return None if found and saved_sha256 and found.sha256 != saved_sha256 else found
        found = tokenizer_files.of_path(given)
        if saved_sha256 and found.sha256 != saved_sha256:
            raise InterchangeError(
                f"--tokenizer-model {given} is not the tokenizer that {self.path} was trained with (sha256 "
                f"{found.sha256[:12]}..., not {saved_sha256[:12]}...): the model's ids mean other pieces"
            )
        return found

    def _vocab_size(self) -> int:
        """Rows without padding: what the args or the tokenizer say, else all there are."""
        rows = self._stored("embedding.word_embeddings.weight")[1].size[0]
        kind, told = self.saved.get("tokenizer_type"), self.saved.get("vocab_size")
        told = told + 1 if told and kind == "NullTokenizer" else told or 0
        size = max(told, self.tokenizer.size if self.tokenizer else 0)
        if size > rows:
            raise InterchangeError(f"{self.path} has {rows} rows in its embedding, too few for {size} ids")
        return size or rows

    def _require_layers(self, told: int) -> None:
        """Raise unless there are as many layers as the args say, before anything is named by them."""
        name = f"{_LAYERS}self_attention.linear_proj.weight"
        fields = self._metadata.state_dict_metadata
        if isinstance(stacked := fields.get(name), TensorStorageMetadata):
            there = stacked.size[0]
        else:
            numbered = re.compile(rf"{re.escape(_LAYERS)}\d+\.self_attention\.linear_proj\.weight")
            there = sum(numbered.fullmatch(key) is not None for key in fields)
        if there != told:
            raise InterchangeError(f"{self.path} holds {there} layers, but its args say {told}")

    def _find_dtype(self) -> torch.dtype:
        """The number format of the model's tensors, the widest where they differ."""
        formats = {self._stored(key)[1].properties.dtype for key in self.keys()}
        if other := formats - {torch.float32, torch.float16, torch.bfloat16}:
            raise InterchangeError(
                f"{self.path} holds {other.pop()}; only fp32, fp16 and bf16 can be exchanged"
            )
        return widest(formats)

    def _stored(self, key: str) -> tuple[str, TensorStorageMetadata, int | None]:
        """Under which name a tensor is stored, its metadata, and its place if all layers are stacked."""
        for stored, layer in _stored_names(key):
            found = self._metadata.state_dict_metadata.get(stored)
            if isinstance(found, TensorStorageMetadata):
                return stored, found, layer
        raise InterchangeError(f"{self.path} lacks {key}")

    def _read(self, key: str) -> Tensor:
        name, stored, layer = self._stored(key)
        size = stored.size if layer is None else stored.size[1:]
        whole = torch.empty(size, dtype=stored.properties.dtype)
        filled = 0
        for chunk in stored.chunks:
            offsets, sizes = chunk.offsets, chunk.sizes
            if layer is not None:
                if not offsets[0] <= layer < offsets[0] + sizes[0]:
                    continue
                offsets, sizes = offsets[1:], sizes[1:]
            piece = self._chunk(name, chunk.offsets)
            if layer is not None:
                piece = piece[layer - chunk.offsets[0]]
            window = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            whole[window] = piece
            filled += piece.numel()
        if filled != whole.numel():
            raise InterchangeError(f"{self.path}: {key} is incomplete")
        return whole[: self.model.vocab_size] if key in _VOCABULARY else whole

    def _chunk(self, name: str, offsets: torch.Size) -> Tensor:
        place = self._metadata.storage_data[MetadataIndex(name, offsets)]
        path = self.path / place.relative_path
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            data = io.BytesIO(mapped[place.offset : place.offset + place.length])
        try:
            return load_object(data, f"{name} in {path}")
        except CheckpointError as error:
            raise InterchangeError(str(error)) from error


def _stored_names(key: str) -> Iterator[tuple[str, int | None]]:
    """The names that a tensor may be stored under, with its index where the layers are stacked."""
    if not key.startswith(_LAYERS):
        yield key, None
        return
    layer, canonical = key.removeprefix(_LAYERS).split(".", 1)
    for name in (canonical, _NORMS.get(canonical, canonical)):
        yield f"{_LAYERS}{name}", int(layer)
        yield f"{_LAYERS}{layer}.{name}", None


def find_checkpoint(path: Path, iteration: int | None = None) -> Path | None:
    """The folder of one checkpoint: ``path`` itself, or the one in it that is asked for or newest.

    Raises InterchangeError if something is there, but no checkpoint, or not that one.
    """
    if (path / ".metadata").is_file():
        return path
    try:
        found = find(path, iteration)
    except CheckpointError as error:
        raise InterchangeError(f"--load: {error}") from error
    for note in found.notes:
        logger.warning(note)
    return found.tries[0][0] if found.tries else None
