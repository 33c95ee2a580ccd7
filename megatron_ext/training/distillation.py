"""Learning from a teacher that predicts while the student is trained (``--teacher-load``)."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_ext.training.batch import Batch, Microbatches, next_batch
from megatron_ext.training.callbacks import State
from megatron_ext.training.taught import GivesTargets
from megatron_ext.training.teacher import Asked, Teacher


class OnlineTeacher(GivesTargets):
    """Gives each microbatch of the student the teacher's targets.

    Without pipeline stages the teacher reads a microbatch just before the student does. With them all stages
    have to work on it together: before a step the teacher reads all its microbatches, one pass through the
    pipeline, and the last stage keeps its hidden states. Logits are made of them when the student is at that
    microbatch, so those of one are there at a time.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(teacher.run.distillation)
        self.teacher = teacher
        self.asked: deque[Asked | None] = deque()
        self.last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    def training_data(self, iterators: Sequence[Microbatches | None]) -> Sequence[Microbatches | None]:
        (self.source,) = iterators  # interleaving is refused
        return [None if self.source is None else self]

    def before_step(self, state: State) -> None:
        super().before_step(state)
        if self.alpha and state.run.parallel.pipeline_model_parallel_size > 1:
            self.asked.extend(
                self.teacher.ask([next_batch(self.source) for _ in range(get_num_microbatches())])
            )

    def __next__(self) -> Batch:
        if not self.alpha:
            return self._read()
        asked = self.asked.popleft() if self.asked else self.teacher.ask([self._read()])[0]
        assert asked is not None  # this stage reads data
        if not self.last_stage:
            return asked.batch
        return replace(asked.batch, targets=self.teacher.targets(asked), alpha=self.alpha)

    def _read(self) -> Batch:
        batch = next_batch(self.source)
        assert batch is not None
        return batch
