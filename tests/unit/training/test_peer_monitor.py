"""The peer monitor: a lost rank is detected at once, and no running rank is reported as lost."""

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


def heard(monitor: PeerMonitor) -> list[int]:
    """The ranks that are now reported as gone."""
    gone = []
    for _ in range(5):
        gone += monitor.wait(0.05)
    return gone


@pytest.fixture
def three(store):
    """The monitors of three ranks, here all in one process."""
    monitors = [PeerMonitor(store, rank, 3) for rank in range(3)]
    assert [heard(end) for end in monitors] == [[], [], []]
    yield monitors
    for end in monitors:
        end.close()


def test_rank_0_informs_the_others_of_a_lost_rank(three):
    three[2].disconnect()  # as the system closes them
    assert [heard(end) for end in three[:2]] == [[2], [2]]


def test_all_ranks_detect_the_end_of_rank_0(three):
    three[0].disconnect()
    assert [heard(end) for end in three[1:]] == [[0], [0]]


def test_a_rank_that_sent_the_shutdown_message_is_not_reported(three):
    three[1].close()
    assert [heard(three[0]), heard(three[2])] == [[], []]
    three[0].close()
    assert heard(three[2]) == []


def test_copies_in_a_forked_process_keep_no_connection_open(three):
    child = os.fork()
    if child == 0:
        os._exit(len(three[0]._connections) + len(three[1]._connections))
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
def test_messages_of_unknown_peers_are_ignored(three, words):
    with socket.create_connection(three[0]._listener.getsockname()[:2]) as peer:
        heard(three[0])
        peer.sendall(words.replace(b"TOKEN", three[0]._token.encode()))
        heard(three[0])
    assert [heard(end) for end in three] == [[], [], []]


def unknown_peers(monitor: PeerMonitor, count: int) -> list[socket.socket]:
    """``count`` connections to the port that send nothing, accepted as they come."""
    there = []
    for _ in range(count):
        there.append(socket.create_connection(monitor._listener.getsockname()[:2]))
        monitor.wait(0.0)
    return there


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_silent_unknown_peers_are_limited_and_block_no_rank(store, monkeypatch):
    monkeypatch.setattr(peer_monitor, "_WINDOW_SECONDS", 0.0)
    monkeypatch.setattr(peer_monitor, "MAX_UNKNOWN_PEERS", 8)
    first, before = PeerMonitor(store, 0, 3), descriptors()
    there = unknown_peers(first, 100)
    assert len(first._unknown) == 8 and descriptors() <= before + 100 + 8
    second = PeerMonitor(store, 1, 3)
    there += unknown_peers(first, 20)
    third = PeerMonitor(store, 2, 3)
    for end in (first, second, third):
        assert heard(end) == []
    second.disconnect()
    assert heard(first) == [1] and heard(third) == [1]
    monkeypatch.setattr(peer_monitor, "UNKNOWN_PEER_SECONDS", 0.0)
    heard(first)
    assert first._unknown == []
    for end in (first, third, *there):
        end.close()


def test_a_flood_of_connections_occupies_no_core(store, monkeypatch):
    monkeypatch.setattr(peer_monitor, "_MAX_ACCEPTS", 8)  # 80 a second
    first, there, turns, end = PeerMonitor(store, 0, 2), [], 0, time.monotonic() + 1.0
    while time.monotonic() < end:
        peer = socket.socket()
        peer.setblocking(False)
        peer.connect_ex(first._listener.getsockname()[:2])
        there.append(peer)
        first.wait(5.0)
        turns += 1
    assert turns < 120
    for line in (first, *there):
        line.close()


def test_sixty_unknown_peers_are_accepted_without_waiting(store):
    """The listen queue is as long as there are ranks; a peer that finds it full retries after a second."""
    first, started = PeerMonitor(store, 0, 2), time.monotonic()
    there = unknown_peers(first, 60)
    assert time.monotonic() - started < 1.0
    for line in (first, *there):
        line.close()


def test_without_descriptors_it_waits_for_some(store, three):
    """The listening socket stays readable: polling it without a pause would occupy a core."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as peer:
        peer.connect(three[0]._listener.getsockname()[:2])
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() - 1, limits[1]))
        try:
            started, turns = time.monotonic(), 0
            while time.monotonic() < started + 1.0:
                three[0].wait(0.3)
                turns += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert turns < 10
        three[2].disconnect()
        assert heard(three[0]) == [2]


def test_a_rank_that_was_dropped_as_unknown_reconnects(store, monkeypatch):
    first, second = PeerMonitor(store, 0, 2), PeerMonitor(store, 1, 2)
    accepted, _ = first._listener.accept()
    accepted.close()  # before it was read
    assert heard(second) == [] and len(second._connections) == 1
    assert heard(first) == [] and heard(second) == [] and second._connections[0].welcome
    first.disconnect()
    assert heard(second) == [0]
    second.close()


def test_a_rank_0_that_has_already_exited_is_an_error(store):
    PeerMonitor(store, 0, 2).disconnect()
    with pytest.raises(LostProcess, match="rank 0 was killed"):
        PeerMonitor(store, 1, 2)


def test_wake_ends_a_wait(store):
    monitor = PeerMonitor(store, 0, 1)
    monitor.wake()
    assert monitor.wait(60) == []
    monitor.close()
