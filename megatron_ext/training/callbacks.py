"""Callbacks of the training loop: hooks around its steps.

A new callback is added to the list in ``training/setup.py:callbacks``; the loop does not change.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_ext.config import RunConfig
from megatron_ext.config.training import TrainingConfig
from megatron_ext.data.views import Samples
from megatron_ext.training.batch import Batch, Microbatches
from megatron_ext.training.schedule import Schedule
from megatron_ext.training.state import BadNumbers, Evaluation, Progress, StepResult, TaskScore


class Callback:
    """Hooks that do nothing. Each hook is called on all ranks, so it may communicate."""

    #: Whether :meth:`losses` is to be called; if no callback needs the losses they are not kept.
    sees_losses = False

    def start(self, state: "State") -> None:
        """Before the first step."""

    def training_data(self, iterators: Sequence[Microbatches | None]) -> Sequence[Microbatches | None]:
        """After the start: the microbatches of each model chunk of this rank, None where it reads none.

        Returns them, or iterators of as many microbatches, each of which may be a :class:`Batch`.
        """
        return iterators

    def before_step(self, state: "State") -> None:
        """Before the forward pass of an iteration."""

    def stage_ends(self, state: "State") -> None:
        """Before the first step of another stage of ``--data-stages``, which changes the state's datasets."""

    def losses(self, batch: Batch, losses: Tensor) -> None:
        """A microbatch and the loss of each of its tokens [b, s], on the ranks that compute it."""

    def before_update(self) -> None:
        """After the backward pass, before any parameter or optimizer state changes."""

    def bad_numbers(self, state: "State", error: BadNumbers) -> bool:
        """After a NaN or Inf, with nothing updated; returns True to continue without an update."""
        return False

    def after_step(self, state: "State", result: StepResult) -> None:
        """After an iteration; ``state.progress`` already includes it."""

    def before_validation(self, state: "State", split: str) -> None:
        """Before a validation or test."""

    def after_validation(self, state: "State", result: Evaluation, split: str) -> None:
        """After a complete validation or test."""

    def after_scoring(self, state: "State", scores: dict[str, dict[str, TaskScore]]) -> None:
        """After the tasks of ``--eval-tasks``: task -> number -> its value."""

    def after_iteration(self, state: "State", last: bool) -> None:
        """At the end of an iteration, after validation; ``last`` is True at the end of the run."""

    def before_save(self, state: "State") -> None:
        """Before a checkpoint: write to disk what a resumed run relies on."""

    def after_error(self, state: "State") -> None:
        """Before a NaN or Inf ends the run; called on all ranks."""

    def end(self, state: "State") -> None:
        """After the last iteration, before the final evaluations; not after an error."""

    def close(self) -> None:
        """Always called last, even after an error: release resources; must not communicate."""


class Callbacks(list[Callback]):
    """The callbacks of a run, in call order."""

    @property
    def sees_losses(self) -> bool:
        """Whether any callback needs the losses."""
        return any(callback.sees_losses for callback in self)

    def __call__(self, hook: str, *args: object) -> list[Any]:
        """Call ``hook`` of each callback; returns the results."""
        return [getattr(callback, hook)(*args) for callback in self]

    def losses(self, batch: Batch, losses: Tensor) -> None:
        """Pass a microbatch's losses to the callbacks that need them."""
        for callback in self:
            if callback.sees_losses:
                callback.losses(batch, losses)


@dataclass
class State:
    """The state of a run, as passed to callbacks.

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
    #: The microbatches of the validation set.
    valid_iterators: Sequence[Microbatches | None] = ()
    #: Tells the watchdog what the rank does: a sign of progress.
    note: Callable[..., None] = lambda *phase: None


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
