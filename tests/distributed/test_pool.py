"""The worker pool itself: results, failures, hangs, and a clean slate after each run."""

import os
import time

import pytest
import torch
from megatron.core import parallel_state

from tests.helpers.parallel import Layout
from tests.helpers.pool import WorkerError


def add_ranks(start: int) -> int:
    total = torch.tensor([start + torch.distributed.get_rank()])
    torch.distributed.all_reduce(total)
    return total.item()


def coordinates() -> tuple[int, int, int]:
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )


def fail_on(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        raise KeyError("the reason")
    torch.distributed.barrier()


def sleep_on(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        time.sleep(60)


def exit_on(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        os._exit(7)


def leave_traces() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")


def traces() -> tuple[bool, bool, int]:
    unset = not parallel_state.model_parallel_is_initialized()
    return unset, "LEFT_BEHIND" not in os.environ and os.getcwd() != "/", torch.get_num_threads()


def test_results_come_in_order_of_ranks(pool):
    assert pool.run(3, add_ranks, 1) == [6, 6, 6]
    assert pool.run(Layout(tp=2, dp=2), coordinates) == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]


def test_next_run_starts_clean(pool):
    pool.run(Layout(tp=2), leave_traces)
    assert pool.run(2, traces) == [(True, True, 1)] * 2


def test_failure_names_rank_and_reason_and_the_pool_survives(pool):
    with pytest.raises(WorkerError, match="rank 1 of 2 failed(?s:.*)KeyError: 'the reason'"):
        pool.run(2, fail_on, 1)
    assert pool.run(2, add_ranks, 0) == [1, 1]


def test_hang_is_ended_and_shows_where(pool):
    with pytest.raises(WorkerError, match="rank 1 of 2 did not end within 1 s(?s:.*)in sleep_on"):
        pool.run(2, sleep_on, 1, timeout=1)
    assert pool.run(2, add_ranks, 0) == [1, 1]


def test_death_of_a_worker_is_reported(pool):
    with pytest.raises(WorkerError, match="rank 0 of 2 failed: the process died with exit code 7"):
        pool.run(2, exit_on, 0)


def test_eight_workers(pool):
    assert pool.run(Layout(tp=2, pp=2, dp=2), add_ranks, 0) == [28] * 8
