"""The processes of a start of a job find each other, whatever an earlier start left in the store."""

import threading
from datetime import timedelta

import pytest
import torch

from megatron_ext.platform.rendezvous import of_this_start

SOON = timedelta(seconds=20)


def start(store, world_size: int, absent: tuple[int, ...] = (), late: tuple[int, ...] = ()) -> dict:
    """The result of each arriving rank: its view of the store, or its error."""
    got: dict = {}
    seconds = timedelta(seconds=0.5) if absent else SOON

    def come(rank: int) -> None:
        try:
            got[rank] = of_this_start(store.clone(), rank, world_size, seconds)
        except RuntimeError as error:
            got[rank] = error

    ranks = [rank for rank in range(world_size) if rank not in absent]
    threads = {rank: threading.Thread(target=come, args=(rank,)) for rank in ranks}
    for rank in sorted(threads, key=late.__contains__):
        threads[rank].start()
        if late and rank not in late:
            threads[rank].join(0.2)
    for thread in threads.values():
        thread.join()
    return got


@pytest.fixture
def store():
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=SOON)


@pytest.mark.parametrize("late", [(), (0,), (1, 2)])
def test_a_start_sees_nothing_of_the_one_before(store, late):
    first = start(store, 3)
    first[1].set("failure", "rank 1 was killed")
    second = start(store, 3, late=late)
    assert [view.check(["failure"]) for view in second.values()] == [False] * 3
    second[0].set("port", "1234")
    assert [second[rank].get("port") for rank in (1, 2)] == [b"1234"] * 2
    assert not first[1].check(["port"])


def test_a_start_that_ended_half_way_is_no_hindrance(store):
    """With other sizes, too: a job may resume with fewer hosts."""
    assert isinstance(start(store, 4, absent=(2,))[0], RuntimeError)
    for size in (3, 5):
        views = start(store, size)
        views[0].set("size", str(size))
        assert [views[rank].get("size") for rank in range(size)] == [str(size).encode()] * size


def test_those_that_did_not_come_are_named(store):
    ends = start(store, 4, absent=(1, 3))
    assert str(ends[0]) == "ranks 1, 3 did not come in time"


def test_alone(store):
    assert not start(store, 1)[0].check(["failure"])
