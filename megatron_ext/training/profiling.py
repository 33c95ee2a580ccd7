"""A window of iterations under torch's profiler (``--profile``)."""

from argparse import Namespace
from pathlib import Path

import torch


class Profiler:
    """Records iterations [``--profile-step-start``, ``--profile-step-end``) on ``--profile-ranks``.

    Writes a Chrome trace per rank below ``--tensorboard-dir`` (or ``profile/``) and, on the first
    of the ranks, a table of the operators by their own time on standard output.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.profiler: torch.profiler.profile | None = None
        self.wanted = args.profile and args.rank in args.profile_ranks

    def before(self, iteration: int) -> None:
        """Start, if ``iteration`` (finished ones so far) opens the window."""
        if self.wanted and iteration == self.args.profile_step_start:
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.start()

    def after(self, iteration: int) -> None:
        """Stop and write, if ``iteration`` closes the window."""
        if self.profiler is None or iteration < self.args.profile_step_end:
            return
        self.profiler.stop()
        folder = Path(self.args.tensorboard_dir or "profile")
        folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(folder / f"trace_rank{self.args.rank}.json"))
        if self.args.rank == self.args.profile_ranks[0]:
            print(self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
        self.profiler = None
