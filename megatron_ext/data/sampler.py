"""The samples of each microbatch of a data parallel rank, in Megatron-LM's order.

Microbatch j of the job holds the samples j*m to j*m + m - 1 (m: micro batch size) of the order;
rank r of d data parallel ranks reads microbatches r, d + r, 2d + r, ... after the consumed ones. The
samples that a job has read after n samples therefore do not depend on d, nor on the number of microbatches
per step. Source: megatron/training/datasets/data_samplers.py of Megatron-LM.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ext.data.indexed import DatasetError


@dataclass(frozen=True)
class SequentialSampler:
    """``--dataloader-type single``: reads the dataset once in order, after ``consumed_samples``.

    The last samples are dropped if they do not fill a microbatch for every rank (drop_last).
    """

    total_samples: int
    consumed_samples: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def __len__(self) -> int:
        left = max(0, self.total_samples - self.consumed_samples)
        return left // (self.micro_batch_size * self.data_parallel_size)

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.data_parallel_size
        first = self.consumed_samples + self.data_parallel_rank * self.micro_batch_size
        for k in range(len(self)):
            start = first + k * stride
            yield list(range(start, start + self.micro_batch_size))


@dataclass(frozen=True)
class CyclicSampler:
    """``--dataloader-type cyclic``: endless epochs, each in its own random order.

    Epoch e has the order of ``torch.randperm`` seeded with e, in whole microbatches, as upstream does with
    one data parallel rank. With several ranks upstream divides the data among them, so that the order depends
    on their number; here the ranks share one order.
    """

    total_samples: int
    consumed_samples: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def __iter__(self) -> Iterator[list[int]]:
        size = self.micro_batch_size
        per_epoch = self.total_samples // size
        if per_epoch == 0:
            raise DatasetError(
                f"the dataset's {self.total_samples} samples are fewer than --micro-batch-size {size}; add "
                "data, or give a smaller --micro-batch-size or --seq-length"
            )
        number = self.consumed_samples // size + self.data_parallel_rank
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            if number // per_epoch != epoch:
                epoch = number // per_epoch
                generator = torch.Generator().manual_seed(epoch)
                order = torch.randperm(per_epoch * size, generator=generator)
            start = number % per_epoch * size
            yield order[start : start + size].tolist()
            number += self.data_parallel_size
