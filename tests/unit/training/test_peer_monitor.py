"""Lines between ranks: who has gone is known at once, and nobody is thought gone who is not."""

import os
import resource
import socket
import time

import pytest
import torch

from megatron_ext.common.errors import LostProcess
from megatron_ext.training import peer_monitor
from megatron_ext.training.peer_monitor import PeerMonitor


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return torch.distributed.HashStore()


def heard(lines: PeerMonitor) -> list[int]:
    """All that there is to hear now."""
    gone = []
    for _ in range(5):
        gone += lines.wait(0.05)
    return gone


@pytest.fixture
def three(store):
    """The lines of three ranks, here all in one process."""
    lines = [PeerMonitor(store, rank, 3) for rank in range(3)]
    assert [heard(end) for end in lines] == [[], [], []]
    yield lines
    for end in lines:
        end.close()


def test_rank_0_tells_the_others_who_has_gone(three):
    three[2].forget()  # as the system closes them
    assert [heard(end) for end in three[:2]] == [[2], [2]]


def test_the_end_of_rank_0_is_heard_by_all(three):
    three[0].forget()
    assert [heard(end) for end in three[1:]] == [[0], [0]]


def test_a_rank_that_says_farewell_is_not_missed(three):
    three[1].close()
    assert [heard(three[0]), heard(three[2])] == [[], []]
    three[0].close()
    assert heard(three[2]) == []


def test_copies_in_a_forked_process_keep_no_line_open(three):
    child = os.fork()
    if child == 0:
        os._exit(len(three[0]._lines) + len(three[1]._lines))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [heard(end) for end in three] == [[], [], []]


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"0123456789abcdef 1\n",
        b"\xff" * 5000,
        b"gone 1\nbye\n",
        b"TOKEN 7\n",
        b"TOKEN x\n",
        b"x\nTOKEN 1\n",
    ],
)
def test_a_stranger_says_nothing_that_counts(three, words):
    with socket.create_connection(three[0]._listener.getsockname()[:2]) as stranger:
        heard(three[0])
        stranger.sendall(words.replace(b"TOKEN", three[0]._token.encode()))
        heard(three[0])
    assert [heard(end) for end in three] == [[], [], []]


def strangers(lines: PeerMonitor, count: int) -> list[socket.socket]:
    """So many connections to the port that say nothing, taken in as they come."""
    there = []
    for _ in range(count):
        there.append(socket.create_connection(lines._listener.getsockname()[:2]))
        lines.wait(0.0)
    return there


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_silent_strangers_use_up_nothing_and_keep_nobody_out(store, monkeypatch):
    monkeypatch.setattr(peer_monitor, "_WINDOW_SECONDS", 0.0)
    monkeypatch.setattr(peer_monitor, "MOST_STRANGERS", 8)
    first, before = PeerMonitor(store, 0, 3), descriptors()
    there = strangers(first, 100)
    assert len(first._strangers) == 8 and descriptors() <= before + 100 + 8
    second = PeerMonitor(store, 1, 3)
    there += strangers(first, 20)
    third = PeerMonitor(store, 2, 3)
    for end in (first, second, third):
        assert heard(end) == []
    second.forget()
    assert heard(first) == [1] and heard(third) == [1]
    monkeypatch.setattr(peer_monitor, "STRANGER_SECONDS", 0.0)
    heard(first)
    assert first._strangers == []
    for end in (first, third, *there):
        end.close()


def test_a_flood_of_strangers_takes_no_core(store, monkeypatch):
    monkeypatch.setattr(peer_monitor, "_AT_ONCE", 8)  # 80 a second
    first, there, turns, end = PeerMonitor(store, 0, 2), [], 0, time.monotonic() + 1.0
    while time.monotonic() < end:
        stranger = socket.socket()
        stranger.setblocking(False)
        stranger.connect_ex(first._listener.getsockname()[:2])
        there.append(stranger)
        first.wait(5.0)
        turns += 1
    assert turns < 120
    for line in (first, *there):
        line.close()


def test_sixty_strangers_are_taken_in_without_waiting(store):
    """The port's queue is as long as there are ranks; one that finds it full tries again after a second."""
    first, started = PeerMonitor(store, 0, 2), time.monotonic()
    there = strangers(first, 60)
    assert time.monotonic() - started < 1.0
    for line in (first, *there):
        line.close()


def test_without_descriptors_it_waits_for_some(store, three):
    """The listening socket stays ready: to be told so again and again would take a core."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as stranger:
        stranger.connect(three[0]._listener.getsockname()[:2])
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() - 1, limits[1]))
        try:
            started, turns = time.monotonic(), 0
            while time.monotonic() < started + 1.0:
                three[0].wait(0.3)
                turns += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert turns < 10
        three[2].forget()
        assert heard(three[0]) == [2]


def test_a_rank_that_was_taken_for_a_stranger_comes_again(store, monkeypatch):
    first, second = PeerMonitor(store, 0, 2), PeerMonitor(store, 1, 2)
    accepted, _ = first._listener.accept()
    accepted.close()  # before it was read
    assert heard(second) == [] and len(second._lines) == 1
    assert heard(first) == [] and heard(second) == [] and second._lines[0].welcome
    first.forget()
    assert heard(second) == [0]
    second.close()


def test_a_rank_0_that_has_gone_before_is_an_error(store):
    PeerMonitor(store, 0, 2).forget()
    with pytest.raises(LostProcess, match="rank 0 was killed"):
        PeerMonitor(store, 1, 2)


def test_a_wait_is_ended_from_elsewhere(store):
    lines = PeerMonitor(store, 0, 1)
    lines.wake()
    assert lines.wait(60) == []
    lines.close()
