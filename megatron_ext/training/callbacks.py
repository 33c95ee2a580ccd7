"""What hangs on the training loop: hooks around its steps, the same for whatever comes next.

A callback is put into the list of ``training/setup.py:callbacks``; the loop is not touched.
"""

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_ext.config import RunConfig
from megatron_ext.config.training import TrainingConfig
from megatron_ext.data.views import Samples
from megatron_ext.training.batch import Batch
from megatron_ext.training.schedule import Schedule
from megatron_ext.training.state import BadNumbers, Evaluation, Progress, StepResult


class Callback:
    """Hooks that do nothing. Each is called on every rank alike, so it may communicate."""

    #: Whether :meth:`losses` wants each microbatch's losses: what nobody looks at is not kept.
    sees_losses = False

    def start(self, state: "State") -> None:
        """Before the first step."""

    def before_step(self, state: "State") -> None:
        """Before the forward pass of an iteration."""

    def losses(self, batch: Batch, losses: Tensor) -> None:
        """A microbatch and the loss of each of its tokens [b, s], where they are known."""

    def before_update(self) -> None:
        """The gradients are there; no parameter and no optimizer state has changed yet."""

    def bad_numbers(self, state: "State", error: BadNumbers) -> bool:
        """A NaN or Inf came up and nothing was updated; True to go on without an update."""
        return False

    def after_step(self, state: "State", result: StepResult) -> None:
        """After an iteration, which ``state.progress`` counts already."""

    def before_validation(self, state: "State", split: str) -> None:
        """Before a validation or test."""

    def after_validation(self, state: "State", result: Evaluation, split: str) -> None:
        """After a validation or test that was not cut short."""

    def after_iteration(self, state: "State", last: bool) -> None:
        """After validation, at the end of an iteration; ``last`` of the run as well."""

    def before_save(self, state: "State") -> None:
        """Before a checkpoint: what it must not get ahead of is brought to the disk."""

    def after_error(self, state: "State") -> None:
        """A NaN or Inf that nobody passed over ends the run; all ranks are here."""

    def end(self, state: "State") -> None:
        """After the last iteration, before the last evaluations; not after an error."""

    def close(self) -> None:
        """Whatever has happened, even an error: let go of what is held; communicate nothing."""


class Callbacks(list[Callback]):
    """The callbacks of a run, in their order."""

    @property
    def sees_losses(self) -> bool:
        """Whether any looks at the losses."""
        return any(callback.sees_losses for callback in self)

    def __call__(self, hook: str, *args: object) -> list[Any]:
        """Call that hook of each; their answers."""
        return [getattr(callback, hook)(*args) for callback in self]

    def losses(self, batch: Batch, losses: Tensor) -> None:
        """Show a microbatch's losses to those that look at them."""
        for callback in self:
            if callback.sees_losses:
                callback.losses(batch, losses)


@dataclass
class State:
    """What a run works with, as callbacks see it.

    ``datasets`` are the training, validation and test sets (None where absent); ``token_bytes`` the UTF-8
    bytes of each token id.
    """

    run: RunConfig
    model: list[nn.Module]
    optimizer: MegatronOptimizer
    scheduler: Schedule
    datasets: tuple[Samples | None, ...]
    token_bytes: torch.Tensor
    callbacks: Callbacks
    progress: Progress = field(default_factory=Progress)


class GarbageCollection(Callback):
    """``--manual-gc``: all ranks collect at the same iterations, so that none waits for another's pause."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config

    def start(self, state: "State") -> None:
        if self.config.manual_gc:
            gc.disable()

    def before_validation(self, state: "State", split: str) -> None:
        if self.config.manual_gc and self.config.manual_gc_eval:
            gc.collect()

    def after_step(self, state: "State", result: StepResult) -> None:
        interval = self.config.manual_gc_interval if self.config.manual_gc else 0
        if interval and state.progress.iteration % interval == 0:
            gc.collect()
