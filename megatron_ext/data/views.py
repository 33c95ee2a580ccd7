"""Views of datasets: endless, chained, and one pass in whole microbatches."""

import sys
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch


class Samples(Protocol):
    """A dataset: Megatron-Core's, or a view of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> dict[str, Any]: ...


class Endless:
    """A dataset that starts over at its end."""

    def __init__(self, dataset: Samples) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.dataset[place % len(self.dataset)]


class Chained:
    """The concatenation of datasets, of the first ``counts`` samples of each or of all."""

    def __init__(self, parts: Sequence[Samples], counts: Sequence[int] | None = None) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(map(len, self.parts) if counts is None else counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, place: int) -> tuple[Any, int]:
        """The dataset of a sample, and the sample's index in it."""
        part = bisect_right(self._ends, place)
        return self.parts[part], place - (self._ends[part - 1] if part else 0)

    def __getitem__(self, place: int) -> dict[str, Any]:
        dataset, place = self.locate(place)
        return dataset[place]


class Span:
    """Samples ``begin`` .. ``end`` - 1 of a dataset, padded to a multiple of ``unit``.

    Padding repeats the last sample with a loss mask of 0, numbered from ``end`` on. Each sample has its
    number in the dataset as ``sample_id``.
    """

    def __init__(self, dataset: Samples, begin: int, end: int, unit: int) -> None:
        self.dataset, self.begin, self.end = dataset, begin, end
        self.length = -(-(end - begin) // unit) * unit

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = self.begin + place
        if number < self.end:
            return {**self.dataset[number], "sample_id": number}
        sample = self.dataset[self.end - 1]
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"]), "sample_id": number}
