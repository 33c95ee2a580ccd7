"""TensorBoard and Weights & Biases under Megatron-LM's tags."""

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.training.side import Side


class MetricWriters:
    """Writes scalars to whichever boards the flags name; none costs nothing.

    A board that fails is tried again later (side.py); the points in between are missing on it.
    """

    def __init__(self, run: RunConfig):
        self.boards: list[tuple[Side, Any]] = []
        if run.logging.tensorboard_dir:
            self.boards.append((Side(f"--tensorboard-dir {run.logging.tensorboard_dir}"), _TensorBoard(run)))
        if run.logging.wandb_project:
            self.boards.append((Side(f"--wandb-project {run.logging.wandb_project}"), _WeightsAndBiases(run)))
        for side, board in self.boards:
            side.attempt(board.connect)

    def __bool__(self) -> bool:
        return bool(self.boards)

    def scalar(self, tag: str, value: float, iteration: int, samples: int | None = None) -> None:
        """One point against iterations, and, on TensorBoard, one against samples where they are given."""
        for side, board in self.boards:
            side.attempt(partial(board.write, tag, value, iteration, samples))

    def close(self) -> None:
        """Write what is queued and close."""
        for side, board in self.boards:
            side.attempt(board.close, now=True)


class _TensorBoard:
    def __init__(self, run: RunConfig):
        # Imported here: it costs a second, and most short runs do without.
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.make = run, SummaryWriter
        self.writer: Any = None
        self._hook = threading.excepthook
        threading.excepthook = self._errors_of_threads

    def connect(self) -> None:
        if self.writer is None:
            run = self.run
            self.writer = self.make(run.logging.tensorboard_dir, max_queue=run.logging.tensorboard_queue_size)
            text = "\n".join(f"    {name} {value}" for name, value in run.flat().items())
            self._keep(lambda: self.writer.add_text("arguments", text))

    def write(self, tag: str, value: float, iteration: int, samples: int | None) -> None:
        self.connect()
        self._keep(lambda: self.writer.add_scalar(tag, value, iteration))
        if samples is not None:
            self._keep(lambda: self.writer.add_scalar(f"{tag} vs samples", value, samples))

    def close(self) -> None:
        threading.excepthook = self._hook
        if self.writer is not None:
            self._keep(self.writer.flush)  # says what closing passes over in silence
            self._keep(self.writer.close)

    def _keep(self, action: Callable[[], object]) -> None:
        """A writer whose thread has met an error writes no more: the next attempt makes a new one."""
        try:
            action()
        except Exception:
            writer, self.writer = self.writer, None
            with contextlib.suppress(Exception):
                writer.close()
            raise

    def _errors_of_threads(self, args: threading.ExceptHookArgs) -> None:
        """The error of a writer's thread is raised again by the next call: its stack is not for the log."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            self._hook(args)


class _WeightsAndBiases:
    def __init__(self, run: RunConfig):
        import wandb

        self.run, self.wandb = run, wandb
        self.writer: Any = None

    def connect(self) -> None:
        if self.writer is None:
            logging = self.run.logging
            self.writer = self.wandb.init(
                project=logging.wandb_project,
                name=logging.wandb_exp_name,
                entity=logging.wandb_entity,
                dir=logging.wandb_save_dir or self.run.checkpoint.save,
                config={name: str(value) for name, value in self.run.flat().items()},
            )

    def write(self, tag: str, value: float, iteration: int, samples: int | None) -> None:
        self.connect()
        self.writer.log({tag: value}, step=iteration)  # its steps only grow: samples would be ahead of them

    def close(self) -> None:
        if self.writer is not None:
            self.writer.finish()
