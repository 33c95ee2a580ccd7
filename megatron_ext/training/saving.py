"""Writes the checkpoints of a run, at intervals and at its end, synchronously or in the background."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_ext.checkpoint import PendingSave, save_checkpoint
from megatron_ext.config import RunConfig
from megatron_ext.platform.collective import print_rank_0
from megatron_ext.training.callbacks import Callback, State
from megatron_ext.training.schedule import Schedule
from megatron_ext.training.side import LinesFile
from megatron_ext.training.state import Progress
from megatron_ext.training.step import parameters_in_place


class Saver(Callback):
    """Writes the checkpoints of a run, one at a time; every method is collective.

    With ``--async-save`` training goes on while the tensors are copied (``before_update`` waits for the
    copies) and while the files are written. The checkpoint is published at the end of the first iteration
    after every rank has written its part, but no later than before the next save or at the end of the run.
    """

    def __init__(
        self,
        run: RunConfig,
        model: list[nn.Module],
        optimizer: MegatronOptimizer,
        scheduler: Schedule,
        saved_at: int,
    ) -> None:
        self.run, self.model, self.optimizer, self.scheduler = run, model, optimizer, scheduler
        self.saved_at = saved_at
        self.pending: PendingSave | None = None
        self.progress: LinesFile | None = None
        if run.logging.log_progress and run.checkpoint.save and run.process.rank == 0:
            self.progress = LinesFile(Path(run.checkpoint.save) / "progress.txt", "--log-progress")
        self.buffers: dict[str, Any] = {}

    def due(self, iteration: int, last: bool) -> bool:
        """Whether ``iteration`` is to be saved and was not saved yet."""
        if not self.run.checkpoint.save or iteration == self.saved_at:
            return False
        interval = self.run.checkpoint.save_interval
        return last or interval is not None and iteration % interval == 0

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, and add its iteration to ``progress``."""
        assert self.run.checkpoint.save is not None  # due() is False without it
        self.finish()
        started = time.perf_counter()
        with parameters_in_place(self.model, self.run.parallel):
            self.pending = save_checkpoint(
                self.run.checkpoint.save,
                progress.iteration,
                model=self.model,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                run_state=asdict(progress),
                run=self.run,
                async_save=self.run.checkpoint.async_save,
                wait_for_copies=False,
                buffers=self.buffers,
            )
        self.saved_at = progress.iteration
        progress.checkpoints.append(progress.iteration)
        blocked = time.perf_counter() - started
        if self.run.checkpoint.async_save:
            print_rank_0(f" checkpoint {progress.iteration}: begun in {blocked:.2f} s, being written")
        else:
            self.finish()
            print_rank_0(
                f" checkpoint {progress.iteration}: written to {self.run.checkpoint.save} in {blocked:.2f} s"
            )

    def after_iteration(self, state: State, last: bool) -> None:
        """Publish a checkpoint that has been written meanwhile, and save if one is due."""
        self.poll()
        if self.due(state.progress.iteration, last):
            state.callbacks("before_save", state)
            self.save(state.progress)

    def end(self, state: State) -> None:
        self.finish()

    def after_error(self, state: State) -> None:
        self.finish()  # called on all ranks; the pending checkpoint is from before the error

    def before_update(self) -> None:
        """Wait until a pending checkpoint has copied the model and the optimizer."""
        if self.pending is not None:
            self.pending.copied()

    def poll(self) -> None:
        """Publish a pending checkpoint if every rank has written it; does not wait."""
        if self.pending is not None and self.pending.ready():
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint, if any, and publish it."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        pending.finish()
        if self.run.checkpoint.async_save:
            print_rank_0(f" checkpoint {pending.iteration}: in place in {self.run.checkpoint.save}")
        if self.progress is not None:
            when, job = time.strftime("%Y-%m-%d %H:%M:%S"), os.environ.get("SLURM_JOB_ID", "")
            gpus, end = self.run.process.world_size, f"Saved checkpoint\tIteration: {pending.iteration}"
            self.progress.write(f"{when}\tJob ID: {job}\t# GPUs: {gpus}\t{end}")
