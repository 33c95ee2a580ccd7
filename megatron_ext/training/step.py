"""One training step: forward and backward over the microbatches, then the update."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.platform.collective import max_over_ranks
from megatron_ext.training import batch as batches
from megatron_ext.training.bad_numbers import check_finite
from megatron_ext.training.callbacks import Callbacks
from megatron_ext.training.schedule import Schedule
from megatron_ext.training.state import StepResult


def train_step(
    iterators: Sequence[batches.Microbatches | None],
    model: list[nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: Schedule,
    run: RunConfig,
    callbacks: Callbacks | None = None,
) -> StepResult:
    """Accumulate the gradients of one global batch over all microbatches and ranks, and update.

    Calls the hooks ``losses`` and ``before_update`` of ``callbacks``.

    Raises:
        BadNumbers: on every rank, before any parameter has changed.
    """
    callbacks = callbacks or Callbacks()
    counter = batches.LossCounter(record=callbacks.losses if callbacks.sees_losses else None)
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums = forward_backward(iterators, model, run, counter, forward_only=False)
    if run.training.check_for_nan_in_loss_and_grad:
        check_finite(model, counter)

    callbacks("before_update")
    if run.training.empty_unused_memory_level >= 1:
        platform.empty_cache()
    updated, grad_norm, num_zeros = update(optimizer, run.training.grad_norm_skip_threshold)
    if run.training.empty_unused_memory_level >= 2:
        platform.empty_cache()
    updated = not max_over_ranks([0.0 if updated else 1.0])[0]
    if updated:
        scheduler.step(increment=get_num_microbatches() * run.samples_at_once)
    loss = float("nan") if sums is None else (sums[0] / sums[1]).item()
    metrics: dict[str, float] = {} if num_zeros is None else {"num_zeros_in_grad": num_zeros}
    if sums is not None and len(sums) > 2:
        metrics["distillation_loss"] = (sums[2] / sums[3]).item()
    return StepResult(loss, float(grad_norm or 0.0), skipped=not updated, metrics=metrics)


def update(optimizer: MegatronOptimizer, limit: float | None) -> tuple[bool, float | None, float | None]:
    """Update the parameters, unless the norm of the gradients is above ``limit``.

    Returns:
        Whether they were updated, the norm before clipping, and the number of zeros in the gradients.
    """
    if limit is not None and not optimizer.prepare_grads():
        grad_norm = optimizer.get_grad_norm()
        if grad_norm > limit:
            return False, grad_norm, None
    return optimizer.step()


def forward_backward(
    iterators: Sequence[batches.Microbatches | None],
    model: list[nn.Module],
    run: RunConfig,
    counter: batches.LossCounter,
    forward_only: bool,
    num_microbatches: int | None = None,
) -> Tensor | None:
    """Run the pipeline schedule; returns the summed report of the last stage, None elsewhere."""
    reduced = get_forward_backward_func()(
        forward_step_func=partial(batches.forward_step, counter=counter),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=num_microbatches or get_num_microbatches(),
        seq_length=run.data.seq_length,
        micro_batch_size=run.training.micro_batch_size,
        forward_only=forward_only,
    )
    return batches.total(reduced)


@contextmanager
def parameters_in_place(model: list[nn.Module], parallel: ParallelConfig) -> Iterator[None]:
    """Finish an overlapped parameter gather, so that parameters are complete inside the context."""
    overlapped = parallel.use_distributed_optimizer and parallel.overlap_param_gather
    if overlapped:
        for chunk in model:
            chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        if overlapped:
            for chunk in model:
                chunk.enable_forward_pre_hook()


@contextmanager
def evaluation_mode(model: list[nn.Module]) -> Iterator[None]:
    """Switch dropout off inside the context."""
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in model:
            chunk.train()
