"""Which errors mean that another process is lost, and which are this rank's own."""

import pytest
import torch

from megatron_ext import platform
from megatron_ext.platform import collective
from megatron_ext.training.watchdog import _lost_connection

NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3356, {kind}, NCCL version 2.27.5\n{last}"


@pytest.mark.parametrize(
    ("kind", "last", "lost"),
    [
        ("remote process exited or there was a network error", "ncclRemoteError: A call failed ...", True),
        ("unhandled system error (run with NCCL_DEBUG=INFO for details)",
         "Last error:\nsocketPollConnect: connect to 10.0.0.2<45731> returned Connection refused", True),
        ("unhandled system error", "Last error:\nConnection closed by remote peer node2<51422>", True),
        ("invalid usage (run with NCCL_DEBUG=WARN for details)",
         "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 3000", False),
        ("unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
         "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n'out of memory'", False),
        ("internal error - please report this issue to the NCCL developers", "", False),
    ],
)  # fmt: skip
def test_errors_of_nccl(kind, last, lost):
    assert _lost_connection(torch.distributed.DistBackendError(NCCL.format(kind=kind, last=last))) is lost


def test_an_error_that_is_not_of_a_process_group_is_this_ranks_own():
    assert not _lost_connection(OSError("Connection refused"))


def timeouts() -> list[float]:
    """Timeouts of the world, and of the control group that it would have with nccl."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_backend", lambda group: "nccl")
        group = collective._new_gloo_group.__wrapped__(torch.distributed.group.WORLD)
    own = torch.distributed.group.WORLD
    return [platform.group_timeout(each).total_seconds() for each in (own, group)]


def test_the_control_group_waits_as_long_as_the_world(pool):
    for own, control in pool.run(2, timeouts):
        assert own == control != 1800.0
