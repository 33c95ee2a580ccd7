"""Data sheet speeds of GPUs, and measurements of the link between processes and of the disk."""

import os
import re
import tempfile
import time
from typing import TYPE_CHECKING

from megatron_ext.common import network

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

#: Words in a GPU's name -> dense peaks of its data sheet in TFLOP/s: bf16 and fp16, fp32. The first row whose
#: words are all in the name is used. These are half of the figures "with sparsity"; fp32 is without TF32,
#: which is not enabled.
_DATA_SHEETS = (
    ("GB200", 2500, 80),
    ("B200", 2250, 75),
    ("GH200", 989, 67),
    ("H200 NVL", 835, 60),
    ("H200", 989, 67),
    ("H100 NVL", 835, 60),
    ("H100 PCIe", 756, 51),
    ("H100", 989, 67),
    ("A100", 312, 19.5),
    ("A800", 312, 19.5),
    ("L40S", 362, 91.6),
)


def data_sheet_flops(name: str, half: bool) -> float | None:
    """Peak FLOP/s of a GPU by its name, in half or single precision, if known."""
    in_name = re.split(r"[\s_-]+", name.upper())
    for words, in_half, in_single in _DATA_SHEETS:
        if set(words.upper().split()) <= set(in_name):
            return (in_half if half else in_single) * 1e12
    return None


def link_bytes_per_second(size: int = 64 << 20, times: int = 5) -> float:
    """Bytes per second in one direction of an all-reduce between two processes; the best of a few."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        result = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_all_reduce, (f"{folder}/store", size, times, result), nprocs=2)
        return result.get()


def _all_reduce(rank: int, store: str, size: int, times: int, result: "SimpleQueue[float]") -> None:
    import torch
    import torch.distributed as dist

    from megatron_ext import platform

    platform.use_rank_device(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", network.LOOPBACK)
    dist.init_process_group(platform.link_backend(), store=dist.FileStore(store, 2), rank=rank, world_size=2)
    tensor = torch.zeros(size // 4, device=platform.current_device())
    best = float("inf")
    for _ in range(times):
        platform.synchronize()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        platform.synchronize()
        best = min(best, time.perf_counter() - start)
    if rank == 0:
        result.put(size / best)  # 2 (p - 1) / p of the tensor is once the tensor for two ranks
    dist.destroy_process_group()


def disk_bytes_per_second(size: int = 64 << 20) -> float:
    """Bytes per second written to disk in the current folder, with fsync."""
    block = os.urandom(size)
    with tempfile.NamedTemporaryFile(dir=".") as file:
        start = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return size / (time.perf_counter() - start)
