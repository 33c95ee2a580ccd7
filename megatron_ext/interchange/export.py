"""Writes a Hugging Face folder that stands alone: weights, configuration, tokenizer, code, model card."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.checkpoint import CheckpointError
from megatron_ext.checkpoint.folders import fsync_dir, write_durably
from megatron_ext.checkpoint.integrity import CHECKSUMS, describe_file, marker
from megatron_ext.checkpoint.lock import locked
from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange import hf_pangu_pi
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.hf_config import write_config
from megatron_ext.interchange.hf_tokenizer import SpecialIds, require_same_tokenizer, write_tokenizer
from megatron_ext.interchange.mapping import Architecture, Entry, architecture_named, architecture_of
from megatron_ext.interchange.model_card import model_card
from megatron_ext.interchange.numbers import to_format
from megatron_ext.interchange.tokenizer_files import TokenizerFiles

SHARD_BYTES = 2 << 30
#: What a user may edit without making the weights suspect.
_NOT_CHECKED = ("README.md", "generation_config.json")


def export_folder(
    save_dir: str | Path,
    model: ModelConfig,
    dtype: torch.dtype,
    get: Callable[[str], Tensor],
    *,
    tokenizer: TokenizerFiles | None = None,
    architecture: str | None = None,
    origin: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model as a folder that ``from_pretrained`` loads; it appears when it is complete.

    Args:
        save_dir: a folder that is empty or not there.
        model: what the model is.
        dtype: the number format to store its tensors in.
        get: name -> tensor, as of :class:`source.Source`.
        tokenizer: the model's tokenizer, if it has one.
        architecture: ``model_type`` to write; by default the plainest that holds the model.
        origin: where the model comes from, for the model card.
        shard_bytes: a file of weights ends before it passes this many bytes; so much memory is used.

    Raises:
        InterchangeError: the folder is taken, also by an export that is still being written, the
            architecture has no place for a tensor, or transformers would read another tokenizer.
    """
    save_dir = Path(save_dir)
    if save_dir.exists() and (not save_dir.is_dir() or any(save_dir.iterdir())):
        raise InterchangeError(f"--save {save_dir} is taken; give a folder that is empty or not there")
    kind = architecture_named(architecture) if architecture else architecture_of(model)
    config = write_config(model, dtype, kind.model_type)
    with _aside(save_dir) as aside:
        special = write_tokenizer(tokenizer, aside)  # first, for it may be refused
        _write_weights(aside, kind, model, dtype, get, shard_bytes)
        _write_texts(aside, model, config, special, origin)
        _require_same(aside, model)
        require_same_tokenizer(tokenizer, aside, kind.model_type)
        _seal(aside)
    return save_dir


@contextmanager
def _aside(save_dir: Path) -> Iterator[Path]:
    """A folder for this process alone, which in the end takes the place of ``save_dir``."""
    parent = save_dir.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    aside = parent / f".incomplete_{save_dir.name}"
    try:
        with locked(aside.with_name(f"{aside.name}.lock"), "another process writes it"):
            shutil.rmtree(aside, ignore_errors=True)  # of one that was killed, as the lock is free
            try:
                aside.mkdir()
                yield aside
                os.replace(aside, save_dir)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            fsync_dir(parent)
    except CheckpointError as error:
        raise InterchangeError(f"--save {save_dir}: {error}") from error


def _write_weights(
    folder: Path,
    kind: Architecture,
    model: ModelConfig,
    dtype: torch.dtype,
    get: Callable[[str], Tensor],
    shard_bytes: int,
) -> None:
    """``model.safetensors``, or several files of it and their index."""
    shards = list(_shards(kind, model, dtype, shard_bytes))
    names: dict[str, str] = {}
    for number, entries in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for entry in entries:
            tensor = to_format(entry.ours, get(entry.ours), dtype)
            parts = entry.layout.split(tensor, model)
            tensors |= {
                name: part.clone(memory_format=torch.contiguous_format)
                for name, part in zip(entry.theirs, parts, strict=True)
            }
        _write_file(tensors, folder / file)
        names |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = model.without_padding.num_parameters * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": names}
        write_json(folder / "model.safetensors.index.json", index)


def _write_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file and compare what is read from it again."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        with safe_open(path, framework="pt") as back:
            for name, tensor in tensors.items():
                if not torch.equal(back.get_tensor(name), tensor):
                    raise InterchangeError(
                        f"{path.name} does not hold {name} as it was written; is the disk sound?"
                    )
    except SafetensorError as error:
        raise InterchangeError(
            f"{path.name} could not be written to {path.parent.parent}: {error}"
        ) from error


def _require_same(folder: Path, model: ModelConfig) -> None:
    """Raise unless the folder, read as any other, is the model that was meant."""
    from megatron_ext.interchange.hf_source import HuggingFaceSource

    back = HuggingFaceSource(folder).model
    if _said(back) != _said(model):
        raise InterchangeError(f"config.json cannot say what this model is: it would be read as {back}")


def _said(model: ModelConfig) -> dict[str, object]:
    """What ``config.json`` must say: the model's function, and two sizes that are no part of it."""
    sizes = {name: getattr(model, name) for name in ("vocab_size", "max_position_embeddings")}
    return model.effective() | sizes


def _shards(
    kind: Architecture, model: ModelConfig, dtype: torch.dtype, shard_bytes: int
) -> Iterator[list[Entry]]:
    """The entries of each file."""
    sizes, used = model.without_padding.parameters(), 0
    entries: list[Entry] = []
    for entry in kind.entries_of(model):
        size = math.prod(sizes[entry.ours]) * dtype.itemsize
        if entries and used + size > shard_bytes:
            yield entries
            entries, used = [], 0
        entries.append(entry)
        used += size
    yield entries


def _write_texts(
    folder: Path, model: ModelConfig, config: dict[str, Any], special: SpecialIds, origin: str
) -> None:
    """Configuration, generation settings, the code of the pi modules, the model card."""
    write_json(folder / "config.json", config | special.of_config())
    if not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", special.of_generation())
    if config["model_type"] == "pangu_pi":
        for name in ("configuration_pangu_pi.py", "modeling_pangu_pi.py"):
            shutil.copyfile(Path(hf_pangu_pi.__file__).parent / name, folder / name)
    write_durably(folder / "README.md", model_card(model, config, special, origin).encode())


def _seal(folder: Path) -> None:
    """Checksums of everything that decides what the model says, then all of it to the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        if path.name not in _NOT_CHECKED:
            files[path.name] = describe_file(path)
    write_durably(folder / CHECKSUMS, marker(0, files))
    fsync_dir(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file for people to read."""
    write_durably(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
