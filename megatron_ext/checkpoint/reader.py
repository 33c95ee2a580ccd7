"""Reads the sharded part of a checkpoint into this rank's tensors; does not communicate."""

import io
import warnings
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    flatten_state_dict,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.planner import ReadItem

from megatron_ext.checkpoint import saved_args
from megatron_ext.checkpoint.bounds import Window
from megatron_ext.checkpoint.errors import DamagedCheckpoint
from megatron_ext.checkpoint.extra_state import without_code
from megatron_ext.checkpoint.safe import load_metadata, load_object, require_bounded_archive


class SafeReader(FileSystemReader):
    """torch's reader of checkpoint folders, with metadata from the safe unpickler."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata given at construction."""
        return self._metadata

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        """The bytes of one tensor or object; raises DamagedCheckpoint if torch cannot have written them."""
        try:
            require_bounded_archive(io.BufferedReader(Window(file, sinfo.offset, sinfo.length)))
        except Exception as error:
            where = f"{self.path}/{sinfo.relative_path}"
            raise DamagedCheckpoint(f"{where} cannot be read safely: {error}") from error
        return super()._slice_file(file, sinfo)


class SafePlanner(MCoreLoadPlanner):
    """Megatron-Core's load planner, with the weights-only unpickler for objects."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Unpickle and store one object."""
        key = read_item.dest_index.fqn
        loaded = load_object(value, key)
        self.state_dict[key] = without_code(key, loaded) if "_extra_state" in key else loaded


def read_shards(
    wanted: dict[str, Any], folder: Path, common: dict[str, Any], metadata: Metadata
) -> dict[str, Any]:
    """Read the sharded tensors and objects of ``wanted`` from ``folder``; returns ``common`` with them.

    These are the steps of Megatron-Core's ``dist_checkpointing.load``, which would unpickle the common part
    itself. Keys and shapes are not compared here: the caller has done so, with better messages.
    """
    with torch.no_grad():
        force_all_tensors_to_non_fp8(wanted)
        sharded, at_hand, factories = load_preprocess(wanted)
        sharded, _ = extract_sharded_base(sharded)
        state = dict(common)
        merge(state, at_hand)
        merge(state, _load(sharded, folder, metadata))
        return apply_factory_merges(state, factories)


def _load(sharded: dict[str, Any], folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Fill the tensors of ``sharded`` from the files; returns the same nested structure."""
    flat, nesting = flatten_state_dict(sharded)
    loaded: dict[str, Any] = {}
    while flat:
        distinct = _first_of_each_shard(flat)
        loaded.update(_load_flat(distinct, folder, metadata))
        flat = {path: value for path, value in flat.items() if path not in distinct}
    nested = unflatten_state_dict(loaded, nesting)
    _restore_dict_types(nested, sharded)
    return nested


def _load_flat(flat: dict[str, ShardedBase], folder: Path, metadata: Metadata) -> dict[str, Any]:
    by_key: dict[str, list[ShardedBase]] = {}
    paths: dict[str, list[str]] = {}
    for path, value in flat.items():
        key = _key(value)
        by_key.setdefault(key, []).append(value)
        paths.setdefault(key, []).append(path)
    tensors = [value for value in flat.values() if isinstance(value, ShardedTensor)]
    state = mcore_to_pyt_state_dict(by_key, True)
    planner = SafePlanner(
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
        shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors if t.allow_shape_mismatch},
    )
    _read(state, planner, SafeReader(folder, metadata), metadata)
    return {
        path: value
        for key, shards in state.items()
        for path, value in zip(paths[key], _unwrap_pyt_sharded_tensor(shards), strict=True)
    }


def _read(state: dict[str, Any], planner: SafePlanner, reader: SafeReader, metadata: Metadata) -> None:
    """As torch.distributed.checkpoint.load on one rank; each rank reads its shards independently."""
    first = torch.distributed.get_rank() == 0
    planner.set_up_planner(state, metadata, is_coordinator=first)
    reader.set_up_storage_reader(metadata, is_coordinator=first)
    with warnings.catch_warnings():
        # It checks isinstance with a tensor class that torch has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    reader.read_data(plan, planner).wait()


def _key(value: ShardedBase) -> str:
    return value.unique_key if isinstance(value, ShardedObject) else value.key


def _first_of_each_shard(flat: dict[str, ShardedBase]) -> dict[str, ShardedBase]:
    """The first of the tensors that share a shard: one read can fill only one tensor."""
    seen, first = set(), {}
    for path, value in flat.items():
        shard = (_key(value), getattr(value, "global_offset", None))
        if shard not in seen:
            seen.add(shard)
            first[path] = value
    return first


def read_common(folder: Path) -> dict[str, Any]:
    """Read the common part of a checkpoint, with its args filtered by :mod:`saved_args`.

    Raises DamagedCheckpoint if it cannot be read, or has parts of another type.
    """
    path = folder / "common.pt"
    common = load_object(path)
    if not isinstance(common, dict):
        raise DamagedCheckpoint(f"{path} holds a {type(common).__name__}, not the parts of a checkpoint")
    _require_kinds(path, common, iteration=int, pangu_pro=dict, optimizer=dict, opt_param_scheduler=dict)
    if "pangu_pro" in common:
        ours = {"run_state": None} | common["pangu_pro"]
        _require_kinds(path, ours, run_state=dict, tokenizer_sha256=str | None, padded_vocab_size=int | None)
    if common.get("args") is not None:
        common["args"] = saved_args.harmless(common["args"], path)
    return common


def _require_kinds(path: Path, part: dict[str, Any], **kinds: Any) -> None:
    for name, kind in kinds.items():
        if name in part and not isinstance(part[name], kind):
            actual = type(part[name]).__name__
            raise DamagedCheckpoint(
                f"{path}: {name} is of type {actual}, not {getattr(kind, '__name__', kind)}"
            )


def read(folder: Path) -> tuple[dict[str, Any], Metadata]:
    """Read the common part and the metadata of a checkpoint; raises DamagedCheckpoint."""
    common = read_common(folder)
    if common.get("args") is not None:
        saved_args.require_room(common["args"], folder)
    return common, load_metadata(folder)
