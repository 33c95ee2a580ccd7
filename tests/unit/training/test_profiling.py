"""The files of a profile, and when they are written; calls of the GPU's recorders are counted."""

import pytest
import torch

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.training.profiling import Profiler

FLAGS = dict(
    profile=True, profile_ranks=[0], profile_step_start=1, profile_step_end=3, use_pytorch_profiler=False,
    record_memory_history=False, memory_snapshot_path="snapshot.pickle", rank=0,
)  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """The calls that a GPU would receive."""
    asked: list = []

    class Window:
        def start(self):
            asked.append("start")

        def stop(self):
            asked.append("stop")

    monkeypatch.setattr(platform, "on_gpu", lambda: True)
    monkeypatch.setattr(platform, "NsysWindow", Window)
    monkeypatch.setattr(platform, "record_memory_history", lambda: asked.append("record"))
    monkeypatch.setattr(platform, "dump_memory_history", lambda path: asked.append(path))
    return asked


def run(iterations: int = 6, **changes) -> None:
    profiler = Profiler(RunConfig.of(FLAGS | changes))
    for iteration in range(iterations):
        profiler.before(iteration)
        torch.ones(2).sum()
        profiler.after(iteration + 1)
    profiler.close()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["start", "stop"]),
        ({"iterations": 2}, ["start", "stop"]),  # a run that ends within the window
        ({"rank": 1}, []),
        ({"record_memory_history": True}, ["record", "start", "stop", "snapshot.pickle"]),
        ({"record_memory_history": True, "profile": False}, ["record", "snapshot.pickle"]),
        ({"record_memory_history": True, "profile": False, "rank": 1}, []),
        (
            {"record_memory_history": True, "profile": False, "rank": 1, "profile_ranks": [0, 1]},
            ["record", "snapshot_rank1.pickle"],
        ),
    ],
)
def test_a_gpu_is_asked_once(calls, changes, expected):
    run(**changes)
    assert calls == expected


def test_a_trace_of_a_run_that_ends_within_the_window(tmp_path, capsys):
    run(2, use_pytorch_profiler=True, tensorboard_dir=str(tmp_path))
    assert (tmp_path / "trace_rank0.json").read_bytes().rstrip().endswith(b"}")
    assert "Self CPU" in capsys.readouterr().out


def test_a_profile_that_fails_ends_nothing(calls, monkeypatch, capsys):
    def full(path: str) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(platform, "dump_memory_history", full)
    run(record_memory_history=True)
    assert calls == ["record", "start", "stop"]
    assert capsys.readouterr().err.count("WARNING: --record-memory-history: [Errno 28]") == 1
