"""A window of iterations under a profiler (``--profile``)."""

from argparse import Namespace
from pathlib import Path

import torch

from megatron_ext import platform


class Profiler:
    """Records iterations [``--profile-step-start``, ``--profile-step-end``) on ``--profile-ranks``.

    On a GPU the window is marked for nsys (``--capture-range cudaProfilerApi``), unless
    ``--use-pytorch-profiler`` asks for torch's profiler; a CPU has torch's profiler only. That one
    writes a Chrome trace per rank below ``--tensorboard-dir`` (or ``profile/``) and, on the first
    of the ranks, a table of the operators by their own time on standard output.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.profiler: torch.profiler.profile | None = None
        self.wanted = args.profile and args.rank in args.profile_ranks
        self.for_nsys = platform.on_gpu() and not args.use_pytorch_profiler
        if args.record_memory_history:
            platform.record_memory_history()

    def before(self, iteration: int) -> None:
        """Start, if ``iteration`` (finished ones so far) opens the window."""
        if self.wanted and iteration == self.args.profile_step_start:
            self.profiler = platform.NsysWindow() if self.for_nsys else torch.profiler.profile()
            self.profiler.start()

    def after(self, iteration: int) -> None:
        """Stop and write, if ``iteration`` closes the window."""
        if self.profiler is None or iteration < self.args.profile_step_end:
            return
        self.profiler.stop()
        if self.args.record_memory_history:
            platform.dump_memory_history(self.args.memory_snapshot_path)
        if self.for_nsys:
            return
        folder = Path(self.args.tensorboard_dir or "profile")
        folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(folder / f"trace_rank{self.args.rank}.json"))
        if self.args.rank == self.args.profile_ranks[0]:
            print(self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
        self.profiler = None
