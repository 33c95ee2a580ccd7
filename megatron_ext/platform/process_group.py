"""Backends of torch.distributed, and joining the processes of a job."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_ext.common import network
from megatron_ext.platform import rendezvous
from megatron_ext.platform.device import current_device, on_gpu

if TYPE_CHECKING:
    import torch


def link_backend() -> str:
    """The backend for a bandwidth test between two processes of this machine; nccl needs a GPU for each."""
    import torch

    return "nccl" if on_gpu() and torch.cuda.device_count() > 1 else "gloo"


def default_backend() -> str:
    """The torch.distributed backend for this device: nccl or gloo."""
    return "nccl" if on_gpu() else "gloo"


def init_process_group(
    backend: str | None,
    rank: int,
    world_size: int,
    local_rank: int,
    timeout: timedelta,
    store: "torch.distributed.Store | None" = None,
) -> None:
    """Create the default process group over the ranks that rendezvoused at ``store``.

    A process without a launcher becomes a world of one. gloo, which Megatron-Core also uses next to nccl, is
    bound to the interface that leads to the first host (``network.py``), unless GLOO_SOCKET_IFNAME is set.
    An existing process group is kept.
    """
    import torch

    if torch.distributed.is_initialized():
        return
    if on_gpu():
        torch.cuda.set_device(local_rank)
    store = rendezvous.open_store(rank, world_size, timeout) if store is None else store
    backend = backend or default_backend()
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = network.gloo_interface(os.environ["MASTER_ADDR"])
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout
    )


def group_timeout(group: "torch.distributed.ProcessGroup") -> timedelta:
    """The timeout of a process group's operations."""
    return group._get_backend(current_device()).options._timeout
