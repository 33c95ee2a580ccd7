"""TensorBoard and Weights & Biases under Megatron-LM's tags."""

import contextlib
import threading
from argparse import Namespace
from typing import Any

from megatron_ext.training.side import Side


class Boards:
    """Writes scalars to whichever boards the flags name; none costs nothing.

    A board that fails is tried again later (side.py); the points in between are missing on it.
    """

    def __init__(self, args: Namespace):
        self.boards: list[tuple[Side, Any]] = []
        if args.tensorboard_dir:
            self.boards.append((Side(f"--tensorboard-dir {args.tensorboard_dir}"), _TensorBoard(args)))
        if args.wandb_project:
            self.boards.append((Side(f"--wandb-project {args.wandb_project}"), _WeightsAndBiases(args)))
        for side, board in self.boards:
            side.attempt(board.connect)

    def __bool__(self) -> bool:
        return bool(self.boards)

    def scalar(self, tag: str, value: float, iteration: int, samples: int | None = None) -> None:
        """One point against iterations, and, on TensorBoard, one against samples where they are given."""
        for side, board in self.boards:
            side.attempt(lambda board=board: board.write(tag, value, iteration, samples))

    def close(self) -> None:
        """Write what is queued and close."""
        for side, board in self.boards:
            side.attempt(board.close, now=True)


class _TensorBoard:
    def __init__(self, args: Namespace):
        # Imported here: it costs a second, and most short runs do without.
        from torch.utils.tensorboard import SummaryWriter

        self.args, self.make, self.writer = args, SummaryWriter, None
        self._hook = threading.excepthook
        threading.excepthook = self._errors_of_threads

    def connect(self) -> None:
        if self.writer is None:
            args = self.args
            self.writer = self.make(args.tensorboard_dir, max_queue=args.tensorboard_queue_size)
            text = "\n".join(f"    {name} {value}" for name, value in vars(args).items())
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

    def _keep(self, action) -> None:
        """A writer whose thread has met an error writes no more: the next attempt makes a new one."""
        try:
            action()
        except Exception:
            writer, self.writer = self.writer, None
            with contextlib.suppress(Exception):
                writer.close()
            raise

    def _errors_of_threads(self, args) -> None:
        """The error of a writer's thread is raised again by the next call: its stack is not for the log."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            self._hook(args)


class _WeightsAndBiases:
    def __init__(self, args: Namespace):
        import wandb

        self.args, self.wandb, self.run = args, wandb, None

    def connect(self) -> None:
        if self.run is None:
            self.run = self.wandb.init(
                project=self.args.wandb_project,
                name=self.args.wandb_exp_name,
                entity=self.args.wandb_entity,
                dir=self.args.wandb_save_dir or self.args.save,
                config={name: str(value) for name, value in vars(self.args).items()},
            )

    def write(self, tag: str, value: float, iteration: int, samples: int | None) -> None:
        self.connect()
        self.run.log({tag: value}, step=iteration)  # its steps only grow: samples would be ahead of them

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()
