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
#: A signal to the job reaches every process of its group; workers leave these to the trainer.
TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def build_data_loader(dataset: Dataset, run: RunConfig, consumed_samples: int, rank: int = 0) -> DataLoader:
    """Microbatches of this rank, starting after ``consumed_samples`` samples of the whole job.

    Uses micro_batch_size, dataloader_type ("single": once in order; "cyclic": endless, shuffled)
    and num_workers of ``run``; the data parallel rank and size are Megatron-Core's, or ``rank`` and
    data_parallel_size if it is not initialised.

    Returns:
        A loader of dicts: the dataset's samples stacked along a new first axis of
        ``micro_batch_size``. With "single" it ends when the dataset does.
    """
    rank, size = _data_parallel(rank, run.parallel.data_parallel_size)
    return DataLoader(
        dataset,
        batch_sampler=_sampler(dataset, run, consumed_samples, rank, size),
        num_workers=run.data.num_workers,
        worker_init_fn=_leave_signals_to_trainer,
        # An own generator, because an iterator consumes a random number for its seed. Taken from the
        # default generator, which dropout uses on a CPU, a resumed run would differ from an uninterrupted
        # one.
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


def _data_parallel(rank: int, size: int) -> tuple[int, int]:
    if parallel_state.model_parallel_is_initialized():
        return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return rank, size


def _leave_signals_to_trainer(_worker: int) -> None:
    for name in TRAINERS_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
