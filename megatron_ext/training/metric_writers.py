"""TensorBoard and Weights & Biases under Megatron-LM's tags."""

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_ext.config.output import LoggingConfig
from megatron_ext.training.side import Side


class MetricWriters:
    """Writes scalars to the boards that the flags name; without one it costs nothing.

    ``arguments`` of the run are written to each board once. A board that fails is retried later (side.py);
    it misses the points in between.
    """

    def __init__(self, config: LoggingConfig, arguments: dict[str, Any]):
        self.boards: list[tuple[Side, Any]] = []
        if config.tensorboard_dir:
            board: Any = _TensorBoard(config, arguments)
            self.boards.append((Side(f"--tensorboard-dir {config.tensorboard_dir}"), board))
        if config.wandb_project:
            board = _WeightsAndBiases(config, arguments)
            self.boards.append((Side(f"--wandb-project {config.wandb_project}"), board))
        for side, board in self.boards:
            side.attempt(board.connect)

    def __bool__(self) -> bool:
        return bool(self.boards)

    def scalar(self, tag: str, value: float, iteration: int, samples: int | None = None) -> None:
        """Write a point against iterations and, on TensorBoard, against ``samples`` where given."""
        for side, board in self.boards:
            side.attempt(partial(board.write, tag, value, iteration, samples))

    def close(self) -> None:
        """Write what is queued and close."""
        for side, board in self.boards:
            side.attempt(board.close, now=True)


class _TensorBoard:
    def __init__(self, config: LoggingConfig, arguments: dict[str, Any]):
        # Imported here: it costs a second, and most short runs do not need it.
        from torch.utils.tensorboard import SummaryWriter

        self.config, self.arguments, self.make = config, arguments, SummaryWriter
        self.writer: Any = None
        self._hook = threading.excepthook
        threading.excepthook = self._errors_of_threads

    def connect(self) -> None:
        if self.writer is None:
            config = self.config
            self.writer = self.make(config.tensorboard_dir, max_queue=config.tensorboard_queue_size)
            text = "\n".join(f"    {name} {value}" for name, value in self.arguments.items())
            self._keep(lambda: self.writer.add_text("arguments", text))

    def write(self, tag: str, value: float, iteration: int, samples: int | None) -> None:
        self.connect()
        self._keep(lambda: self.writer.add_scalar(tag, value, iteration))
        if samples is not None:
            self._keep(lambda: self.writer.add_scalar(f"{tag} vs samples", value, samples))

    def close(self) -> None:
        threading.excepthook = self._hook
        if self.writer is not None:
            self._keep(self.writer.flush)  # raises what closing would ignore
            self._keep(self.writer.close)

    def _keep(self, action: Callable[[], object]) -> None:
        """Drop a writer that failed: its thread writes no more, and the next attempt makes a new one."""
        try:
            action()
        except Exception:
            writer, self.writer = self.writer, None
            with contextlib.suppress(Exception):
                writer.close()
            raise

    def _errors_of_threads(self, args: threading.ExceptHookArgs) -> None:
        """Log no stack of a writer's thread: the next call raises its error again."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            self._hook(args)


class _WeightsAndBiases:
    def __init__(self, config: LoggingConfig, arguments: dict[str, Any]):
        import wandb

        self.config, self.arguments, self.wandb = config, arguments, wandb
        self.writer: Any = None

    def connect(self) -> None:
        if self.writer is None:
            self.writer = self.wandb.init(
                project=self.config.wandb_project,
                name=self.config.wandb_exp_name,
                entity=self.config.wandb_entity,
                dir=self.config.wandb_save_dir or self.arguments["save"],
                config={name: str(value) for name, value in self.arguments.items()},
            )

    def write(self, tag: str, value: float, iteration: int, samples: int | None) -> None:
        self.connect()
        self.writer.log({tag: value}, step=iteration)  # its steps only grow: samples would be ahead of them

    def close(self) -> None:
        if self.writer is not None:
            self.writer.finish()
