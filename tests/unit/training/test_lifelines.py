"""Lines between ranks: who has gone is known at once, and nobody is thought gone who is not."""

import os
import socket

import pytest
import torch

from megatron_ext.training.errors import LostProcess
from megatron_ext.training.lifelines import Lifelines


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return torch.distributed.HashStore()


def heard(lines: Lifelines) -> list[int]:
    """All that there is to hear now."""
    gone = []
    for _ in range(5):
        gone += lines.wait(0.05)
    return gone


@pytest.fixture
def three(store):
    """The lines of three ranks, here all in one process."""
    lines = [Lifelines(store, rank, 3) for rank in range(3)]
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


@pytest.mark.parametrize("words", [b"", b"0123456789abcdef 1\n", b"\xff" * 5000, b"gone 1\nbye\n"])
def test_a_stranger_says_nothing_that_counts(three, words):
    with socket.create_connection(three[0]._listener.getsockname()[:2]) as stranger:
        heard(three[0])
        stranger.sendall(words)
        heard(three[0])
    assert [heard(end) for end in three] == [[], [], []]


def test_a_rank_0_that_has_gone_before_is_an_error(store):
    Lifelines(store, 0, 2).forget()
    with pytest.raises(LostProcess, match="rank 0 was killed"):
        Lifelines(store, 1, 2)


def test_a_wait_is_ended_from_elsewhere(store):
    lines = Lifelines(store, 0, 1)
    lines.wake()
    assert lines.wait(60) == []
    lines.close()
