"""A window of iterations under a profiler (``--profile``), and the record of GPU memory."""

import os
from pathlib import Path

import torch

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.training.callbacks import Callback, State
from megatron_ext.training.side import Side
from megatron_ext.training.state import StepResult


class Profiler(Callback):
    """Profiles iterations [``--profile-step-start``, ``--profile-step-end``) on ``--profile-ranks``.

    On a GPU the window is marked for nsys (``--capture-range cudaProfilerApi``), unless
    ``--use-pytorch-profiler`` selects torch's profiler, the only one on a CPU. torch's profiler writes a
    Chrome trace per rank below ``--tensorboard-dir`` (or ``profile/``) and, on the first of these ranks,
    prints a table of operators by self time.

    ``--record-memory-history`` records the allocations of the same ranks, and writes them at the end of
    the window, or without ``--profile`` at the end of the run. A failing profile does not end training.
    """

    def __init__(self, run: RunConfig):
        self.run = run
        self.profiler: torch.profiler.profile | platform.NsysWindow | None = None
        chosen = run.process.rank in run.profiling.profile_ranks
        self.wanted = run.profiling.profile and chosen
        self.for_nsys = platform.on_gpu() and not run.profiling.use_pytorch_profiler
        self.side, self.memory_side = Side("--profile"), Side("--record-memory-history")
        self.records_memory = run.profiling.record_memory_history and chosen
        if self.records_memory:
            self.memory_side.attempt(platform.record_memory_history)

    def before_step(self, state: State) -> None:
        self.before(state.progress.iteration)

    def after_step(self, state: State, result: StepResult) -> None:
        self.after(state.progress.iteration)

    def before(self, iteration: int) -> None:
        """Start if the window begins after ``iteration`` finished iterations."""
        if self.wanted and iteration == self.run.profiling.profile_step_start:
            self.profiler = platform.NsysWindow() if self.for_nsys else torch.profiler.profile()
            if not self.side.attempt(self.profiler.start):
                self.profiler = None

    def after(self, iteration: int) -> None:
        """Stop and write if the window ends after ``iteration``."""
        if self.profiler is None or iteration < self.run.profiling.profile_step_end:
            return
        self._end()

    def close(self) -> None:
        """Stop and write an open profile: the run may end or fail inside the window."""
        self._end()

    def _end(self) -> None:
        profiler, self.profiler = self.profiler, None
        if profiler is not None and self.side.attempt(profiler.stop) and not self.for_nsys:
            self.side.attempt(lambda: self._write(profiler))
        if self.records_memory:
            self.records_memory = False
            path = self._of_rank(Path(self.run.profiling.memory_snapshot_path))
            self.memory_side.attempt(lambda: platform.dump_memory_history(str(path)))

    def _write(self, profiler: torch.profiler.profile) -> None:
        folder = Path(self.run.logging.tensorboard_dir or "profile")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"trace_rank{self.run.process.rank}.json"
        profiler.export_chrome_trace(str(path))
        _require_complete(path)
        if self.run.process.rank == self.run.profiling.profile_ranks[0]:
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))

    def _of_rank(self, path: Path) -> Path:
        """``path``, with the number of the rank in its name if several ranks write one."""
        several = len(self.run.profiling.profile_ranks) > 1
        name = f"{path.stem}_rank{self.run.process.rank}{path.suffix}"
        return path.with_name(name) if several else path


def _require_complete(path: Path) -> None:
    """Raise OSError if a JSON file is incomplete, which torch does not report."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 16))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(f"{path}: was not written to its end")
