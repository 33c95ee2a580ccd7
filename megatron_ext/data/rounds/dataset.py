"""The training set of a round: the samples that an index selects, for several epochs.

ROUND.npy     int64 [selected]: numbers of samples of the first round's training set, ascending
ROUND.json    the manifest (megatron_ext/data/rounds/build_round.py writes both)
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ext.data.indexed import DatasetError
from megatron_ext.data.rounds.loss_record import map_array, read_json

if TYPE_CHECKING:
    from megatron_ext.data.views import Samples

FORMAT = "megatron_ext.round/1"
#: Orders of the samples in training.
ORDERS = ("shuffled", "training")
_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 6
#: Number of ids read at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class RoundPaths:
    """The files of a round, named ROUND or ROUND.npy."""

    index: Path
    manifest: Path
    plot: Path


def round_paths(path: str | Path) -> RoundPaths:
    """The files that belong to ``path``."""
    stem = str(path).removesuffix(".npy")
    return RoundPaths(*(Path(f"{stem}{end}") for end in (".npy", ".json", ".png")))


@dataclass(frozen=True)
class RoundIndex:
    """An index to train on; ``ids`` (int64 [selected]) is mapped into memory."""

    path: Path
    ids: np.ndarray
    manifest: dict[str, Any]


def read_round(path: str | Path) -> RoundIndex:
    """Open an index, and check it against its manifest; reads all of it.

    Raises:
        DatasetError: a file is missing, damaged, or of another format.
    """
    paths = round_paths(path)
    if not paths.manifest.exists():
        raise DatasetError(
            f"{paths.index}: has no manifest {paths.manifest.name}; tools/build_round.py makes both, the "
            "manifest last"
        )
    names = ("round", "samples", "selected", "sha256", "order", "dataset")
    manifest = read_json(paths.manifest, FORMAT, names)
    if manifest["order"] not in ORDERS:
        raise DatasetError(f"{paths.manifest}: its order is {manifest['order']!r}, not {' or '.join(ORDERS)}")
    ids = map_array(paths.index, np.int64)
    if len(ids) != manifest["selected"]:
        raise DatasetError(
            f"{paths.index}: holds {len(ids):,} samples, but {paths.manifest.name} says "
            f"{manifest['selected']:,}; build the round again"
        )
    _check_ids(paths, ids, manifest)
    return RoundIndex(paths.index, ids, manifest)


def _check_ids(paths: RoundPaths, ids: np.ndarray, manifest: dict[str, Any]) -> None:
    """Check every id: a wrong one would silently train on another sample."""
    digest, before = hashlib.sha256(), -1
    for begin in range(0, len(ids), _BLOCK):
        block = np.ascontiguousarray(ids[begin : begin + _BLOCK], dtype="<i8")
        digest.update(block.data)
        if block[0] <= before or (np.diff(block) <= 0).any() or block[-1] >= manifest["samples"]:
            raise DatasetError(
                f"{paths.index}: its samples are not ascending numbers from 0 to "
                f"{manifest['samples'] - 1:,}: it is damaged; build the round again"
            )
        before = block[-1]
    if digest.hexdigest() != manifest["sha256"]:
        raise DatasetError(
            f"{paths.index}: its samples are not those that {paths.manifest.name} was written for: one of "
            "the two is damaged or of another round; build the round again"
        )


class NumberedDataset:
    """A dataset whose samples have their number in it, as ``sample_id``."""

    def __init__(self, dataset: "Samples") -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def sample_id(self, place: int) -> int:
        """The number in the underlying dataset of the sample at index ``place``: the index itself."""
        return place

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = self.sample_id(place)
        return {**self.dataset[number], "sample_id": number}


class RoundDataset(NumberedDataset):
    """The selected samples of a dataset, for as many epochs as ``samples`` need.

    Index i is in epoch i // n, where n is the number of selected samples. Each epoch has its own order,
    determined by seed and epoch, or the order of the index if its manifest says so. No order is stored, so
    that ten billion samples need no memory, and a resumed run needs only its number of consumed samples.

    Args:
        dataset: the first round's training set.
        index: the numbers of the selected samples.
        samples: the number of samples needed; the length is rounded up to whole epochs.
        seed: seed of the order.
    """

    def __init__(self, dataset: "Samples", index: RoundIndex, samples: int, seed: int) -> None:
        super().__init__(dataset)
        self.ids, self.seed = index.ids, seed
        self.base_samples: int = index.manifest["samples"]
        self.shuffled: bool = index.manifest["order"] == "shuffled"
        self.epochs = max(1, -(-samples // len(self.ids)))

    def __len__(self) -> int:
        return self.epochs * len(self.ids)

    def sample_id(self, place: int) -> int:
        """The number in the underlying dataset of the sample at index ``place``."""
        epoch, place = divmod(place, len(self.ids))
        if self.shuffled:
            place = Permutation(len(self.ids), (self.seed, epoch))(place)
        return int(self.ids[place])


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation of 0 .. size - 1, computed element by element.

    A Feistel network with the key ``key`` is a bijection of the next power of four; repeating it until the
    result is below ``size`` gives a bijection of 0 .. size - 1 (cycle walking, Black and Rogaway 2002). It
    needs at most four steps on average.
    """

    size: int
    key: tuple[int, ...]

    @cached_property
    def _half(self) -> int:
        return max(1, (self.size - 1).bit_length() + 1 >> 1)

    @cached_property
    def _keys(self) -> list[int]:
        state = 0
        for part in self.key:
            state = _mix(state ^ part)
        return [_mix(state + number) for number in range(1, _FEISTEL_ROUNDS + 1)]

    def __call__(self, place: int) -> int:
        mask = (1 << self._half) - 1
        while True:
            left, right = place >> self._half, place & mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            place = left << self._half | right
            if place < self.size:
                return place

    def __iter__(self) -> Iterator[int]:
        return map(self, range(self.size))


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that mixes well."""
    value = value + 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
