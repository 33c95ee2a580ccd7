"""The training loop: steps, validation, saves, and an orderly shutdown."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.timers import Timers
from torch import nn

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.platform.collective import print_rank_0
from megatron_ext.training.bad_numbers import LocalGradients
from megatron_ext.training.batch import Microbatches
from megatron_ext.training.callbacks import State
from megatron_ext.training.data import chunk_iterators, validation_iterators, whole_set
from megatron_ext.training.evaluation import evaluate
from megatron_ext.training.signals import StopSignals
from megatron_ext.training.state import BadNumbers, StepResult
from megatron_ext.training.step import train_step
from megatron_ext.training.stopping import Stopping
from megatron_ext.training.watchdog import Watchdog


@dataclass
class Trainer(State):
    """The state of a run, and the training loop."""

    def train(self, watchdog: Watchdog | None = None, signals: StopSignals | None = None) -> None:
        """Train to ``--train-iters``, or until a signal, a time limit or an interval stops the run.

        Progress is noted in ``watchdog``; ``signals`` holds the stop signals received so far.
        """
        run, signals = self.run, signals or StopSignals()
        connect(self.model, self.optimizer, run)
        for chunk in self.model:
            chunk.train()
        self.stopping = Stopping(run.training, signals)
        self.note = watchdog.note if watchdog else self.note
        self.watched: Callable[[Any], Any] = watchdog.watch if watchdog else lambda iterator: iterator
        if watchdog:
            watchdog.on_launcher_gone = lambda: signals.request("word that the launcher has gone")
        # Without training, evaluate from the first sample: the same model then always has the same loss.
        consumed = 0 if run.validation.skip_train else self.progress.consumed_valid_samples
        read_in_parts = None if run.validation.full_validation else self.datasets[1]
        self.valid_iterators = validation_iterators(read_in_parts, run, consumed)
        try:
            self.callbacks("start", self)
            reason = None if run.validation.skip_train else self._train_iterations()
            self.callbacks("end", self)
            if reason is None:
                self._last_evaluations()
        except BadNumbers:
            self.callbacks("after_error", self)
            raise
        finally:
            # Ends the data worker processes. This object and the watchdog refer to each other, so both live
            # until Python's exit, which would wait for the workers.
            self.valid_iterators = []
            self.callbacks("close")

    def _train_iterations(self) -> str | None:
        """Train; returns why the loop ended early, or None."""
        run, progress = self.run, self.progress
        consumed = progress.consumed_train_samples - progress.round_start
        iterators: Sequence[Microbatches | None] = [
            self.watched(iterator) for iterator in chunk_iterators(self.datasets[0], run, consumed)
        ]
        for callback in self.callbacks:
            iterators = callback.training_data(iterators)
        if progress.iteration >= run.training.train_iters:
            print_rank_0(
                f" nothing to train: iteration {progress.iteration} of {run.training.train_iters} is done"
            )
        if progress.validation_due and self.datasets[1] is not None:
            self.validate("validation")
        while progress.iteration < run.training.train_iters:
            update_num_microbatches(progress.consumed_train_samples, consistency_check=True, verbose=True)
            self.callbacks("before_step", self)
            started = time.perf_counter()
            self.note("a training step", progress.iteration)
            result = self._step(iterators)
            progress.iteration += 1
            progress.consumed_train_samples += get_current_running_global_batch_size()
            progress.consumed_train_tokens += get_current_running_global_batch_size() * run.data.seq_length
            result.seconds = time.perf_counter() - started
            self.callbacks("after_step", self, result)
            if self._validation_is_due():
                self.validate("validation")
            self.note("agreeing whether to stop, and saving", progress.iteration)
            reason = self.stopping.reason(progress.iteration)
            last = reason is not None or progress.iteration == run.training.train_iters
            self.callbacks("after_iteration", self, last)
            if reason:
                unsaved = "" if run.checkpoint.save else "; nothing was saved, as there is no --save"
                print_rank_0(f"exiting program at iteration {progress.iteration}: {reason}{unsaved}")
                return reason
        return None

    def _step(self, iterators: Sequence[Microbatches | None]) -> StepResult:
        """One iteration: a training step, or a skip because of the flags or of NaN or Inf."""
        if self.progress.iteration + 1 in self.run.training.iterations_to_skip:
            return self._skip_step(iterators)
        try:
            return train_step(iterators, self.model, self.optimizer, self.scheduler, self.run, self.callbacks)
        except BadNumbers as error:
            if not any(self.callbacks("bad_numbers", self, error)):
                raise
            return StepResult(float("nan"), float("nan"), skipped=True, bad=True)

    def _skip_step(self, iterators: Sequence[Microbatches | None]) -> StepResult:
        """Read one global batch without training on it (``--iterations-to-skip``)."""
        for iterator in iterators:
            if iterator is not None:
                for _ in range(get_num_microbatches()):
                    next(iterator)
        self.progress.skipped_train_samples += get_current_running_global_batch_size()
        return StepResult(float("nan"), 0.0, skipped=True)

    def validate(self, split: str) -> None:
        """Evaluate on ``--eval-iters`` global batches, or on the whole set; a collective call."""
        run, progress = self.run, self.progress
        self.note(f"evaluating on the {split} set", progress.iteration)
        self.callbacks("before_validation", self, split)
        dataset = self.datasets[1 if split == "validation" else 2]
        unit = run.samples_at_once
        iterators = self.valid_iterators
        passes = [run.training.global_batch_size // unit] * run.validation.eval_iters
        if run.validation.full_validation:
            assert dataset is not None  # checked by the callers
            iterators, passes = whole_set(dataset, run)
        elif split == "test":
            iterators = validation_iterators(dataset, run, 0)
        iterators = [self.watched(iterator) for iterator in iterators]
        result = evaluate(iterators, self.model, run, self.token_bytes, passes, self.stopping.requested)
        progress.validation_due = result is None and split == "validation"
        if result is None:
            print_rank_0(f"validation of iteration {progress.iteration} cut short: the run stops")
            return
        if split == "validation":
            progress.consumed_valid_samples += sum(passes) * unit
        self.callbacks("after_validation", self, result, split)

    def _validation_is_due(self) -> bool:
        """Whether there is a validation set and ``--eval-interval`` divides the iteration."""
        interval, iteration = self.run.validation.eval_interval, self.progress.iteration
        if self.datasets[1] is None or not interval or not iteration:
            return False
        return iteration % interval == 0

    def _last_evaluations(self) -> None:
        """Validation and test loss of the final model, as at the end of a Megatron-LM run."""
        if self.datasets[1] is not None and (self.run.validation.skip_train or not self._validation_is_due()):
            self.validate("validation")
        if self.datasets[2] is not None:
            self.validate("test")


def connect(model: list[nn.Module], optimizer: MegatronOptimizer, run: RunConfig) -> None:
    """Set the hooks of Megatron-Core's schedules: loss scale, gradient reduction, parameter gathering."""
    config = model[0].config
    config.timers = Timers(run.logging.timing_log_level, run.logging.timing_log_option)
    config.grad_scale_func = optimizer.scale_loss
    # With overlap the reduction starts before the gradients can be checked.
    checks = run.training.check_for_nan_in_loss_and_grad and not run.parallel.overlap_grad_reduce
    config.finalize_model_grads_func = LocalGradients() if checks else finalize_model_grads

    def per_chunk(method: str) -> Any:
        methods = [getattr(chunk, method) for chunk in model]
        return methods[0] if len(methods) == 1 else methods

    if run.parallel.overlap_grad_reduce:
        config.no_sync_func = per_chunk("no_sync")
        if run.parallel.align_grad_reduce and run.parallel.pipeline_model_parallel_size > 1:
            config.grad_sync_func = per_chunk("start_grad_sync")
    if (
        run.parallel.overlap_param_gather
        and run.parallel.align_param_gather
        and run.parallel.pipeline_model_parallel_size > 1
    ):
        config.param_sync_func = per_chunk("start_param_sync")
    platform.synchronize()
