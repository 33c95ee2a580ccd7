"""Writes a checkpoint of ours from a stream of tensors, one at a time, in one process.

The format is that of ``training.checkpointing`` (torch_dist, as Megatron-LM names it), but nothing is
built: neither a model nor a process group is needed, and no more than one tensor is held.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_ext.arguments.parser import CommandLineError, configured
from megatron_ext.checkpoint import CheckpointError, content, folders, writer
from megatron_ext.checkpoint.integrity import CHECKSUMS, describe, marker
from megatron_ext.checkpoint.lock import saving_into
from megatron_ext.checkpoint.save import FORMAT, serialised
from megatron_ext.config import RunConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange import tokenizer_files
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.numbers import to_format
from megatron_ext.interchange.tokenizer_files import TokenizerFiles

Tensors = Callable[[str], Tensor] | Iterable[tuple[str, Tensor]]
#: A file of the checkpoint ends with the tensor that passes this many bytes.
_FILE_BYTES = 1 << 30
_LAYERS = "decoder.layers."
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
#: Modules whose state in Transformer Engine's layers is more than tensors; empty here.
_WITH_EXTRA_STATE = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
Item = tuple[WriteItem, Tensor | io.BytesIO]


def write_checkpoint(
    save_dir: str | Path,
    model: ModelConfig,
    dtype: torch.dtype,
    tensors: Tensors,
    *,
    tokenizer: TokenizerFiles | None = None,
    overrides: dict[str, object] | None = None,
    iteration: int = 0,
) -> Path:
    """Write ``SAVE/iter_{iteration}``, loadable at any layout, with the weights alone.

    The tokenizer's files are copied to ``SAVE/tokenizer``, and the checkpoint's args name them there.

    Args:
        save_dir: a folder without checkpoints; made if need be.
        model: what the model is.
        dtype: the number format to store its tensors in.
        tensors: name -> tensor, called in the order of ``model.parameters()``; or (name, tensor) pairs
            in any order. Names and sizes are those of ``model.parameters()``; embedding and output layer
            may come with or without the vocabulary's padding, which is filled with zeros.
        tokenizer: the model's tokenizer; without one, ids are numbers (NullTokenizer).
        overrides: destination -> value of checkpoint args that do not follow from the model.
        iteration: the iteration to be written into the checkpoint.

    Returns the checkpoint's folder.

    Raises:
        InterchangeError: there are checkpoints already, or a run saves there; the tensors are not those of
            ``model``, or the tokenizer has more ids than the model. Nothing is left behind then.
    """
    save_dir = Path(save_dir)
    tokenizer = tokenizer or tokenizer_files.null(model.vocab_size)
    tokenizer_files.require_fit(tokenizer, model.vocab_size, save_dir)
    with _working_folder(save_dir, iteration) as working:
        tokenizer.copy_into(save_dir / "tokenizer")
        moved = tokenizer.moved_to(save_dir.absolute() / "tokenizer")
        run = checkpoint_args(model, dtype, moved, overrides)
        files = _write_tensors(working, model.num_layers, _in_order(tensors, model, dtype))
        common = content.common_part(iteration, {}, run, None)
        common["content_metadata"] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        for name, data in (("common.pt", serialised(common)), ("metadata.json", FORMAT)):
            folders.write_durably(working / name, data)
            files[name] = describe(data)
        folders.write_durably(working / CHECKSUMS, marker(iteration, files))
        return folders.publish(save_dir, iteration)


@contextmanager
def _working_folder(save_dir: Path, iteration: int) -> Iterator[Path]:
    """Where the checkpoint is written, by this process alone; an error removes all that was made."""
    _require_new(save_dir)
    made = [path for path in (save_dir / "tokenizer", save_dir) if not path.exists()]
    try:
        with saving_into(save_dir, wait=0):
            _require_new(save_dir)
            made.insert(0, folders.prepare(save_dir, iteration))
            try:
                yield made[0]
            except BaseException:
                for path in made:
                    shutil.rmtree(path, ignore_errors=True)
                raise
    except CheckpointError as error:
        raise InterchangeError(f"--save {save_dir}: {error}") from error


def _require_new(save_dir: Path) -> None:
    if there := folders.list_iterations(save_dir):
        raise InterchangeError(f"--save {save_dir} holds checkpoints already ({there}); give a new folder")


def checkpoint_args(
    model: ModelConfig,
    dtype: torch.dtype,
    tokenizer: TokenizerFiles,
    overrides: dict[str, object] | None = None,
) -> RunConfig:
    """The configuration of a run that would have made this checkpoint, defaults filled in."""
    values = vars(model) | {
        "padded_vocab_size": model.vocab_rows,
        "softmax_vocab_size": model.vocab_size,
        "seq_length": model.max_position_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": dtype == torch.bfloat16,
        "tokenizer_type": tokenizer.kind,
        "tokenizer_model": None if tokenizer.model is None else str(tokenizer.model),
        "vocab_size": model.vocab_size - (tokenizer.kind == "NullTokenizer"),
        "mock_data": True,
        "micro_batch_size": 1,
        "train_iters": 1,
        "lr": 1e-4,
    }
    try:
        run = configured(values, world_size=1, device="cpu", check_files=False)
    except CommandLineError as error:
        raise InterchangeError(f"no run could make this model: {'; '.join(error.problems)}") from error
    # Said afterwards: fp16 trains on GPUs alone, but is written and read anywhere.
    more: dict[str, object] = {"fp16": dtype == torch.float16, "params_dtype": dtype}
    return run.but(tokenizer_sha256=tokenizer.sha256, **more, **(overrides or {}))


def _in_order(tensors: Tensors, model: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor as it is stored) of all the tensors of ``model``, each once; raises InterchangeError."""
    missing = model.parameters()
    pairs = ((name, tensors(name)) for name in list(missing)) if callable(tensors) else tensors
    for name, tensor in pairs:
        size = missing.pop(name, None)
        if size is None:
            raise InterchangeError(f"{name} came twice, or is not part of this model")
        if name in _VOCABULARY:
            tensor = _with_padding(tensor, model)
        if tensor.size() != size:
            raise InterchangeError(f"{name} is {list(tensor.size())}, it must be {list(size)}")
        yield name, to_format(name, tensor, dtype)
    if missing:
        raise InterchangeError(f"these tensors did not come: {', '.join(missing)}")


def _with_padding(tensor: Tensor, model: ModelConfig) -> Tensor:
    """[vocab_size, h] -> [vocab_rows, h]; one that is padded is left as it is."""
    if tensor.size(0) != model.vocab_size or model.vocab_size == model.vocab_rows:
        return tensor
    rows = torch.zeros(model.vocab_rows, tensor.size(1), dtype=tensor.dtype)
    rows[: model.vocab_size] = tensor
    return rows


def _write_tensors(
    folder: Path, layers: int, tensors: Iterator[tuple[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """Write the ``*.distcp`` files and ``.metadata``; returns their entries for ``checksums.json``."""
    written = writer.Written({}, {})
    described: dict[str, Any] = {}
    items = _items(layers, tensors, described)
    for number, first in enumerate(items):
        places, name, entry = writer.write_file(folder, f"__0_{number}.distcp", _one_file(first, items))
        written.places.update(places)
        written.files[name] = entry
    metadata = writer.dump_metadata(Metadata(described), [written])
    folders.write_durably(folder / ".metadata", metadata)
    return written.files | {".metadata": describe(metadata)}


def _one_file(first: Item, items: Iterator[Item]) -> Iterator[Item]:
    """``first`` and those that follow it, until there is enough for a file."""
    size, pair = 0, cast("Item | None", first)
    while pair is not None:
        yield pair
        size += writer.size_of(pair[1])
        pair = next(items, None) if size < _FILE_BYTES else None


def _items(layers: int, tensors: Iterator[tuple[str, Tensor]], described: dict[str, Any]) -> Iterator[Item]:
    """What is written, with its entry in ``described``: a layer's tensors are slices of stacked ones."""
    for key, tensor in tensors:
        offset = torch.Size([0] * tensor.dim())
        stacked = 1
        if key.startswith(_LAYERS):
            layer, name = key.removeprefix(_LAYERS).split(".", 1)
            key, tensor, stacked = f"{_LAYERS}{name}", tensor[None], layers
            offset = torch.Size([int(layer), *offset])
        size = torch.Size([tensor.size(0) * stacked, *tensor.size()[1:]])
        properties = TensorProperties(dtype=tensor.dtype)
        entry = described.setdefault(key, TensorStorageMetadata(properties, size, []))
        entry.chunks.append(ChunkStorageMetadata(offset, tensor.size()))
        index = MetadataIndex(key, offset, len(entry.chunks) - 1)
        yield WriteItem(index, WriteItemType.SHARD), tensor
    for number in range(layers):
        for module in _WITH_EXTRA_STATE:
            key = f"{_LAYERS}{module}._extra_state/shard_{number}_{layers}"
            described[key] = BytesStorageMetadata()
            yield WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO), _nothing()


def _nothing() -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save([None], buffer)  # a list of shards, each with its object
    return buffer
