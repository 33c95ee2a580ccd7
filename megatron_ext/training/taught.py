"""What an online and a stored teacher share: they stand in place of the student's microbatches."""

from typing import TypeVar

from megatron_ext.config.distillation import DistillationConfig
from megatron_ext.training.batch import Microbatches
from megatron_ext.training.callbacks import Callback, State
from megatron_ext.training.state import StepResult

Self = TypeVar("Self", bound="GivesTargets")


class GivesTargets(Callback):
    """Iterates over the student's microbatches from ``source``, with targets where ``alpha`` is not 0.

    ``__next__`` is the teacher's.
    """

    def __init__(self, flags: DistillationConfig) -> None:
        self.flags = flags
        self.source: Microbatches | None = None
        self.alpha = 0.0

    def before_step(self, state: State) -> None:
        """The teacher's share in the next iteration; none in one that is skipped."""
        training, done = state.run.training, state.progress.iteration
        skipped = done + 1 in training.iterations_to_skip
        self.alpha = 0.0 if skipped else self.flags.alpha(done / training.train_iters)

    def __iter__(self: Self) -> Self:
        return self

    def after_step(self, state: State, result: StepResult) -> None:
        if self.flags.distillation_alpha_decay_style != "constant":
            result.metrics["distillation_alpha"] = self.alpha
