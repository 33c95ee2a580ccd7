"""Writes the sharded part of a checkpoint: in this process, in threads, in three steps.

    plan    (collective)  who writes which shard; rank 0 knows what the whole will be
    write   (local)       each rank writes its files and notes their checksums
    collect (collective)  rank 0 learns where everything lies; a failure anywhere is everyone's

Upstream's writer starts processes for the middle step, which costs seconds a save and hangs for
ever if one of them dies. The format is torch.distributed.checkpoint's, file for file as upstream
names them (``__{rank}_{i}.distcp``), and the same machinery of Megatron-Core translates shards.
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

#: Files a rank writes at the same time, each from its own thread.
_FILES_PER_RANK = 2
#: Below this many bytes a rank writes one file: every file costs a wait for the disk.
_ONE_FILE_BYTES = 64 << 20


@dataclass
class ShardPlan:
    """What this rank writes, file by file, and on rank 0 the metadata of the whole."""

    files: list[list[tuple[WriteItem, Any]]]
    metadata: Metadata | None


@dataclass
class Written:
    """Where this rank's shards lie, and its files' entries in ``checksums.json``."""

    places: dict[MetadataIndex, _StorageInfo]
    files: dict[str, dict[str, Any]]


def plan(sharded_state_dict: dict[str, Any]) -> ShardPlan:
    """Agree on who writes what; collective.

    ``sharded_state_dict`` holds ShardedTensors and ShardedObjects only; each rank writes those
    of which it is the main replica.
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
    """Share the items among files of about the same size."""
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


#: Copies on the CPU by shard, kept from one background save to the next: new memory costs more than the copy.
Buffers = dict[MetadataIndex, torch.Tensor]


def snapshot(
    shard_plan: ShardPlan,
    buffers: Buffers | None,
    beside: Callable[[], AbstractContextManager[None]],
) -> ShardPlan:
    """A copy on the CPU of all that will be written, so that training may go on meanwhile.

    Copies go into ``buffers`` where it has a fitting one, which must not be in use any more. Run in
    another thread, the tensors must not change before it returns; ``beside`` is of
    platform.side_stream, called where the tensors were computed.
    """
    buffers = {} if buffers is None else buffers

    def copied(item: WriteItem, value: Any) -> Any:
        if isinstance(value, io.BytesIO):
            return value
        kept = buffers.get(item.index)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            pinned = value.device.type != "cpu"
            kept = buffers[item.index] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        with beside():
            return kept.copy_(value.detach(), non_blocking=True)

    with ThreadPoolExecutor(max_workers=_FILES_PER_RANK) as threads:
        files = [
            list(zip((item for item, _ in file), threads.map(copied, *zip(*file, strict=True)), strict=True))
            for file in shard_plan.files
        ]
    return ShardPlan(files, shard_plan.metadata)


def write(shard_plan: ShardPlan, folder: Path) -> Written:
    """Write this rank's files into ``folder``; communicates nothing. Raises OSError as it comes."""
    rank = torch.distributed.get_rank()
    written = Written({}, {})
    # The whole file has a SHA-256; a CRC-32 of each record would cost more, and one thread at a time.
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
    """Write one file from items that may be made one at a time.

    Returns where each item lies, the file's name, and its entry in ``checksums.json``.
    """
    stream = HashingStream(folder / name)
    places = {}
    try:
        for item, value in items:
            start = stream.size
            if item.type == WriteItemType.BYTE_IO:
                stream.write(value.getbuffer())
            else:
                torch.save(_alone(value), stream)
            places[item.index] = _StorageInfo(name, start, stream.size - start)
    except BaseException as error:
        stream.abandon()
        # torch's archive, closed while a write fails, hides the disk's reason behind its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    return places, name, stream.close()


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the CPU and with memory of its own: torch.save writes the whole storage behind a view."""
    tensor = tensor.detach().cpu()
    exact = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if exact and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def dump_metadata(metadata: Metadata, written: list[Written]) -> bytes:
    """The content of ``.metadata``, now that it is known where every rank's shards lie."""
    metadata.storage_data = {index: place for each in written for index, place in each.places.items()}
    metadata.storage_meta = StorageMeta(checkpoint_id=os.fspath("."))
    return pickle.dumps(metadata)
