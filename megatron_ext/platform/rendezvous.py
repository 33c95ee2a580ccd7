"""Where the processes of a job meet: a key-value store in which each start of the job is by itself."""

import os
import secrets
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: The first process looks for those that have not come yet, this often.
_LOOK_SECONDS = 0.05


def open_store(rank: int, world_size: int, timeout: timedelta) -> "torch.distributed.Store":
    """The store of the job, at MASTER_ADDR:MASTER_PORT, as only the processes of this start see it.

    torchrun's store outlives the processes that it starts again (--max-restarts), and with it all keys:
    the addresses of processes that have gone, the reason why they ended. A process without a launcher
    has a store of its own; where a process group was joined before, it is the group's.

    Raises RuntimeError if not all processes meet in time.
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
    """A view of ``store`` that no process of an earlier or later start of the job has.

    torchrun's count of restarts cannot tell the starts apart: after a change of members that of one host
    grows and that of another does not. So each process says hello with a number of its own, which the
    first one answers with the number of the start; an earlier hello of the same rank may still lie there
    and is answered too, in vain.

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
    """Tell the number of the start to every process that says hello, until all are here."""
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
        time.sleep(_LOOK_SECONDS)
