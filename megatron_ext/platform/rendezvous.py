"""Rendezvous of a job's processes: a key-value store with separate keys for each start of the job."""

import os
import secrets
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Interval at which rank 0 polls for the other ranks.
_POLL_SECONDS = 0.05


def open_store(rank: int, world_size: int, timeout: timedelta) -> "torch.distributed.Store":
    """The store of the job at MASTER_ADDR:MASTER_PORT, with keys that belong to this start of the job.

    torchrun's store outlives the processes that it restarts (--max-restarts), and keeps all keys: the
    addresses of dead processes, and the reasons why they ended. A process without a launcher has a store of
    its own; if a process group exists, its store is used.

    Raises RuntimeError if not all processes arrive in time.
    """
    import torch

    if torch.distributed.is_initialized():
        return torch.distributed.distributed_c10d._get_default_store()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        return torch.distributed.HashStore()
    store = next(torch.distributed.rendezvous("env://", rank, world_size, timeout=timeout))[0]
    return of_this_start(store, rank, world_size, timeout)


def of_this_start(
    store: "torch.distributed.Store", rank: int, world_size: int, timeout: timedelta
) -> "torch.distributed.Store":
    """A prefix of ``store`` that is unique to this start of the job.

    torchrun's restart count cannot distinguish the starts: after a change of membership it increases on one
    host and not on another. Instead each process writes a hello with a random number, and rank 0 answers it
    with the number of the start; a hello left by an earlier start of the same rank is answered too, without
    effect.

    Raises RuntimeError after ``timeout``.
    """
    import torch

    own = secrets.token_hex(8)
    if rank == 0:
        start = own
        _answer(store, start, world_size, timeout)
    else:
        store.set(f"hello/{rank}", own)
        store.wait([f"start/{own}"], timeout)
        start = store.get(f"start/{own}").decode()
        store.set(f"here/{start}/{rank}", "")
    return torch.distributed.PrefixStore(f"start/{start}", store)


def _answer(store: "torch.distributed.Store", start: str, world_size: int, timeout: timedelta) -> None:
    """Answer every hello with the number of the start, until all ranks have confirmed."""
    deadline = time.monotonic() + timeout.total_seconds()
    answered = dict.fromkeys(range(1, world_size), b"")
    while True:
        for rank in list(answered):
            if store.check([f"here/{start}/{rank}"]):
                del answered[rank]
            elif store.check([f"hello/{rank}"]) and (hello := store.get(f"hello/{rank}")) != answered[rank]:
                answered[rank] = hello
                store.set(f"start/{hello.decode()}", start)
        if not answered:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {', '.join(map(str, answered))} did not come in time")
        time.sleep(_POLL_SECONDS)
