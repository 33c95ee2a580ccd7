"""The samples of a run: how many it needs, and this rank's stream of microbatches."""

import math
from collections.abc import Iterator
from typing import Any

from megatron.core import parallel_state

from megatron_ext.arguments.defaults import running_batch
from megatron_ext.common.errors import RunError
from megatron_ext.config import RunConfig
from megatron_ext.config.data import ValidationConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.training import TrainingConfig
from megatron_ext.data import build_data_loader
from megatron_ext.data.amounts import epochs, without_a_sample
from megatron_ext.data.views import Endless, Samples, Span
from megatron_ext.platform.collective import on_first_rank, print_rank_0
from megatron_ext.training.batch import needs_data
from megatron_ext.training.state import Progress

#: Training, validation and test set, each None if absent.
Datasets = tuple[Samples | None, ...]


class OutOfData(RunError):
    """The dataset ended before the run did."""


def dataset_sizes(
    training: TrainingConfig, validation: ValidationConfig
) -> tuple[int, int | None, int | None]:
    """Samples of the training, validation and test sets, counted as Megatron-LM counts them.

    The number enters the index of a dataset (its epochs and shuffles), so it has to be upstream's
    for the same samples to come in the same order (training.py:get_train_valid_test_num_samples).
    """
    train = training.train_samples or training.train_iters * training.global_batch_size
    evaluations = 1
    if validation.eval_interval and not validation.skip_train:
        evaluations = training.train_iters // validation.eval_interval + 1
    batch = validation.eval_iters * training.global_batch_size
    # None samples the whole set once.
    return (train, None, None) if validation.full_validation else (train, evaluations * batch, batch)


def samples_drawn(progress: Progress, run: RunConfig) -> int:
    """The number of samples that a training set which begins now is shuffled for."""
    if run.data.stage_end is not None:
        return run.data.stage_end - progress.round_start
    return dataset_sizes(run.training, run.validation)[0]


def samples_to_read(progress: Progress, run: RunConfig) -> int:
    """How many samples of its training set the run reads by the last iteration, from the set's first."""
    if run.data.stage_end is not None:
        return run.data.stage_end - progress.round_start
    read = progress.consumed_train_samples - progress.round_start
    if run.training.train_samples is not None:
        return max(read, run.training.train_samples - progress.round_start)
    return read + max(0, run.training.train_iters - progress.iteration) * running_batch(run)


def print_data_summary(datasets: Datasets, samples: int, run: RunConfig) -> None:
    """Print the number of epochs, and warnings about the datasets; a collective call.

    ``samples`` are read from the training set.
    """
    for line in on_first_rank(lambda: list(_data_summary(datasets, samples, run))):
        print_rank_0(line)


def _data_summary(datasets: Datasets, samples: int, run: RunConfig) -> Iterator[str]:
    train, *held_out = datasets
    if train is not None:
        often = epochs(train, samples)
        yield f" data: {samples:,} training samples, {often:.3g} epochs of the training set"
        if often > samples:
            length = run.data.seq_length
            yield f"WARNING: the training set is shorter than one sequence of --seq-length {length}"
        for prefix in without_a_sample(train):
            yield f"WARNING: none of the {samples:,} samples is of {prefix}: its weight is too small"
    for name, dataset in zip(("validation", "test"), held_out, strict=True):
        samples = run.validation.eval_iters * run.training.global_batch_size
        if dataset is None or run.validation.full_validation:
            continue
        if (often := epochs(dataset, samples)) > 1:
            yield (
                f"WARNING: --eval-iters {run.validation.eval_iters} of --global-batch-size "
                f"{run.training.global_batch_size} go {often:.1f} times through the {name} set; "
                "--full-validation looks at each sample once"
            )
    if (
        held_out[0] is None
        and run.validation.eval_interval
        and (run.validation.eval_iters or run.validation.full_validation)
    ):
        yield "WARNING: there is no validation set: --eval-interval does nothing"


def chunk_iterators(
    dataset: Samples | None, run: RunConfig, consumed_samples: int
) -> list[Iterator[dict[str, Any]] | None]:
    """An iterator over this rank's microbatches for each of its model chunks; None for chunks without data.

    The chunks of an interleaved pipeline each read the same microbatches in the same order.

    Call this while no collective is in progress: the data worker processes are forked here, not at the first
    microbatch, and a fork while another thread enters or leaves the interpreter, as the threads of an
    unfinished collective do, can deadlock the child.
    """
    stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    if dataset is None:
        return [None] * (stages or 1)
    return [
        _microbatches(dataset, run, consumed_samples) if needs_data(run.data, stage) else None
        for stage in (range(stages) if stages else [None])
    ]


def _microbatches(dataset: Samples, run: RunConfig, consumed_samples: int) -> Iterator[dict[str, Any]]:
    """The microbatches after ``consumed_samples``."""
    return _to_the_end(dataset, iter(build_data_loader(dataset, run, consumed_samples)))


def _to_the_end(dataset: Samples, microbatches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from microbatches
    raise OutOfData(f"the dataset's {len(dataset)} samples are used up; lower --train-iters, or add data")


def validation_iterators(
    dataset: Samples | None, run: RunConfig, consumed_samples: int
) -> list[Iterator[dict[str, Any]] | None]:
    """As chunk_iterators, for a dataset that starts over at its end.

    A run may be resumed with fewer validations than it was started with; the samples consumed so far may then
    exceed the size of the set.
    """
    if dataset is not None and run.data.dataloader_type != "cyclic":
        dataset = Endless(dataset)
    return chunk_iterators(dataset, run, consumed_samples)


def pipeline_group(parallel: ParallelConfig) -> int:
    """The number of microbatches in a pass through an interleaved pipeline is a multiple of this."""
    stages = parallel.pipeline_model_parallel_size
    return math.lcm(stages, parallel.microbatch_group_size_per_vp_stage or stages)


def whole_set(dataset: Samples, run: RunConfig) -> tuple[list[Iterator[dict[str, Any]] | None], list[int]]:
    """Every sample of a dataset once: iterators as from chunk_iterators, and the microbatches of each pass.

    The last microbatches are padded with samples that do not count, so that neither the layout nor the batch
    size changes which samples are evaluated.
    """
    group, unit = pipeline_group(run.parallel), run.samples_at_once
    span = Span(dataset, 0, len(dataset), unit * group)
    most = max(1, run.training.global_batch_size // unit // group) * group
    count = len(span) // unit
    iterators = chunk_iterators(span, run.but(dataloader_type="single"), 0)
    return iterators, [min(most, count - done) for done in range(0, count, most)]
