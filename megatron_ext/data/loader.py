"""A data loader that yields the microbatches of one data parallel rank."""

import signal
from itertools import islice

import torch
from megatron.core import parallel_state
from torch.utils.data import DataLoader, Dataset

from megatron_ext.config import RunConfig
from megatron_ext.data.sampler import CyclicSampler, SequentialSampler

SAMPLERS: dict[str, type[SequentialSampler] | type[CyclicSampler]] = {
    "single": SequentialSampler,
    "cyclic": CyclicSampler,
}
#: A signal for the job reaches every process of its group; these are the trainer's to answer.
TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def build_data_loader(dataset: Dataset, run: RunConfig, consumed_samples: int, rank: int = 0) -> DataLoader:
    """Microbatches of this rank, beginning after ``consumed_samples`` samples of the whole job.

    Reads micro_batch_size, dataloader_type ("single": once in order; "cyclic": without end,
    shuffled) and num_workers of ``run``; the data parallel rank and size are Megatron-Core's, or
    ``rank`` and data_parallel_size where it is not initialised.

    Returns:
        A loader of dicts: the dataset's samples stacked along a new first axis of
        ``micro_batch_size``. With "single" it ends when the dataset does.
    """
    size = run.parallel.data_parallel_size
    if parallel_state.model_parallel_is_initialized():
        rank = parallel_state.get_data_parallel_rank()
        size = parallel_state.get_data_parallel_world_size()
    return DataLoader(
        dataset,
        batch_sampler=_sampler(dataset, run, consumed_samples, rank, size),
        num_workers=run.data.num_workers,
        worker_init_fn=_leave_signals_to_trainer,
        # Its own, because an iterator draws a seed: from the default generator that would be one
        # number of the dropout's on a CPU, and a resumed run would no longer be the whole one.
        generator=torch.Generator(),
    )


def sample_numbers(
    dataset: Dataset, run: RunConfig, consumed_samples: int, count: int, rank: int
) -> list[list[int]]:
    """The samples of the next ``count`` microbatches of a data parallel rank, without reading them."""
    size = run.parallel.data_parallel_size
    return list(islice(_sampler(dataset, run, consumed_samples, rank, size), count))


def _sampler(
    dataset: Dataset, run: RunConfig, consumed_samples: int, rank: int, size: int
) -> SequentialSampler | CyclicSampler:
    kind = SAMPLERS[run.data.dataloader_type or "single"]
    return kind(len(dataset), consumed_samples, run.training.micro_batch_size, rank, size)


def _leave_signals_to_trainer(_worker: int) -> None:
    for name in TRAINERS_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
