"""Writes the sharded part of a checkpoint from threads of this process, in three steps.

    plan    (collective)  which rank writes which shard; rank 0 builds the metadata of the whole
    write   (local)       each rank writes its files and computes their checksums
    collect (collective)  rank 0 gathers the location of every shard; a failure is raised on all ranks

Upstream's writer starts processes for the second step, which costs seconds per save and hangs forever if
one of them dies. The format is torch.distributed.checkpoint's, with upstream's file names
(``__{rank}_{i}.distcp``), and Megatron-Core's own code translates the shards.
"""

import io
import os
import pickle
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.utils.serialization import config

from megatron_ext.checkpoint.errors import together
from megatron_ext.checkpoint.integrity import HashingStream
from megatron_ext.platform.collective import gather

#: Files that a rank writes in parallel, each in its own thread.
_FILES_PER_RANK = 2
#: Below this many bytes a rank writes one file, because every file costs an fsync.
_ONE_FILE_BYTES = 64 << 20


@dataclass
class ShardPlan:
    """The items of each file of this rank, and on rank 0 the metadata of the whole checkpoint."""

    files: list[list[tuple[WriteItem, Any]]]
    metadata: Metadata | None


@dataclass
class Written:
    """The locations of this rank's shards, and its files' entries in ``checksums.json``."""

    places: dict[MetadataIndex, _StorageInfo]
    files: dict[str, dict[str, Any]]


def plan(sharded_state_dict: dict[str, Any]) -> ShardPlan:
    """Plan which rank writes which shards; collective.

    ``sharded_state_dict`` holds only ShardedTensors and ShardedObjects; each rank writes those
    of which it has the main replica.
    """
    shards, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
    planner = MCoreSavePlanner(flatten_state_dict=False)
    first = torch.distributed.get_rank() == 0

    def local_plan() -> SavePlan:
        planner.set_up_planner(mcore_to_pyt_state_dict(shards, False), is_coordinator=first)
        return planner.create_local_plan()

    own = together("plan a checkpoint", local_plan)
    plans = gather(own)
    metadata = together("plan a checkpoint", lambda: planner.create_global_plan(plans)[1] if first else None)
    planner.finish_plan(own)
    data = [(item, planner.resolve_data(item)) for item in own.items]
    return ShardPlan(_divide(data), metadata)


def _divide(data: list[tuple[WriteItem, Any]]) -> list[list[tuple[WriteItem, Any]]]:
    """Distribute the items over files of about equal size."""
    total = sum(size_of(value) for _, value in data)
    count = 1 if total < _ONE_FILE_BYTES else _FILES_PER_RANK
    files: list[list[tuple[WriteItem, Any]]] = [[] for _ in range(count)]
    sizes = [0] * count
    for item, value in sorted(data, key=lambda pair: -size_of(pair[1])):
        smallest = sizes.index(min(sizes))
        files[smallest].append((item, value))
        sizes[smallest] += size_of(value)
    return [file for file in files if file]


def size_of(value: Any) -> int:
    """Bytes of an item."""
    return value.getbuffer().nbytes if isinstance(value, io.BytesIO) else value.numel() * value.element_size()


#: CPU copies by shard, reused from one background save to the next: allocating costs more than copying.
Buffers = dict[MetadataIndex, torch.Tensor]


def snapshot(
    shard_plan: ShardPlan,
    buffers: Buffers | None,
    side_stream: Callable[[], AbstractContextManager[None]],
) -> ShardPlan:
    """Copy everything to be written to the CPU, so that training can go on during the write.

    Reuses a matching tensor of ``buffers``, which must not be in use any more. The tensors must not change
    until this returns, also if it runs in another thread; ``side_stream`` is the result of
    platform.side_stream(), called in the thread that computed the tensors.
    """
    buffers = {} if buffers is None else buffers

    def copied(item: WriteItem, value: Any) -> Any:
        if isinstance(value, io.BytesIO):
            return value
        kept = buffers.get(item.index)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            pinned = value.device.type != "cpu"
            kept = buffers[item.index] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        with side_stream():
            return kept.copy_(value.detach(), non_blocking=True)

    with ThreadPoolExecutor(max_workers=_FILES_PER_RANK) as threads:
        files = [
            list(zip((item for item, _ in file), threads.map(copied, *zip(*file, strict=True)), strict=True))
            for file in shard_plan.files
        ]
    return ShardPlan(files, shard_plan.metadata)


def write(shard_plan: ShardPlan, folder: Path) -> Written:
    """Write this rank's files into ``folder``; does not communicate. Raises OSError."""
    rank = torch.distributed.get_rank()
    written = Written({}, {})
    # Each file has a SHA-256; a CRC-32 of each record would cost extra, and runs in one thread at a time.
    without_crc = config.patch("save.compute_crc32", False)
    with without_crc, ThreadPoolExecutor(max_workers=_FILES_PER_RANK) as threads:
        jobs = [
            threads.submit(write_file, folder, f"__{rank}_{number}.distcp", items)
            for number, items in enumerate(shard_plan.files)
        ]
        for job in jobs:
            places, name, entry = job.result()
            written.places.update(places)
            written.files[name] = entry
    return written


def write_file(
    folder: Path, name: str, items: Iterable[tuple[WriteItem, Any]]
) -> tuple[dict[MetadataIndex, _StorageInfo], str, dict[str, Any]]:
    """Write one file; ``items`` may be a generator.

    Returns the location of each item, the file's name, and its entry in ``checksums.json``.
    """
    stream = HashingStream(folder / name)
    places = {}
    try:
        for item, value in items:
            start = stream.size
            if item.type == WriteItemType.BYTE_IO:
                stream.write(value.getbuffer())
            else:
                torch.save(_own_storage(value), stream)
            places[item.index] = _StorageInfo(name, start, stream.size - start)
    except BaseException as error:
        stream.abandon()
        # If a write fails, torch's archive raises an error of its own that hides the OSError.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    return places, name, stream.close()


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the CPU with its own storage: torch.save would write the whole storage behind a view."""
    tensor = tensor.detach().cpu()
    exact = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if exact and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def dump_metadata(metadata: Metadata, written: list[Written]) -> bytes:
    """The content of ``.metadata``, completed with the locations of every rank's shards."""
    metadata.storage_data = {index: place for each in written for index, place in each.places.items()}
    metadata.storage_meta = StorageMeta(checkpoint_id=os.fspath("."))
    return pickle.dumps(metadata)
