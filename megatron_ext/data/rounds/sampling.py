"""Weighted sampling without replacement over any number of groups, exact, in a few passes.

With scores s_i and p = softmax(s), the k largest of s_i + G_i (G_i independent standard Gumbel) are
distributed as k samples without replacement, each with the remaining p renormalised (Gumbel top-k;
Yellott 1977, Efraimidis and Spirakis 2006). Neither the sum of exponentials nor an array of all keys is
needed: the keys come from a generator that is seeded for each chunk of groups, so every pass regenerates
them. The first pass counts them in 65,536 bins, the second gathers the keys of the bin with the k-th largest
key, which gives its value, and the last pass returns the keys above it. It needs the memory of a chunk and of
one bin, about a hundredth of a float per group.

Groups can be divided into strata, each with its own number of samples.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

#: Number of groups per chunk; a chunk's number seeds its keys.
CHUNK = 1 << 20
BINS = 1 << 16

#: One chunk: scores (float64 [n]) and strata (int [n]; None for a single stratum).
Chunk = tuple[np.ndarray, np.ndarray | None]
#: The same, and which of the groups are selected (bool [n]).
Drawn = tuple[np.ndarray, np.ndarray | None, np.ndarray]


def gumbel_keys(scores: np.ndarray, seed: tuple[int, ...], chunk: int) -> np.ndarray:
    """``scores`` plus Gumbel noise, float64 [n]; -log of an exponential variable is Gumbel."""
    generator = np.random.default_rng([*seed, chunk])
    with np.errstate(divide="ignore"):
        return scores - np.log(generator.standard_exponential(len(scores)))


@dataclass(frozen=True)
class Threshold:
    """Selects the keys above ``key``, and the first ``ties`` keys equal to it."""

    key: float
    ties: int = 0


def thresholds(
    chunks: Callable[[], Iterable[Chunk]], counts: list[int], seed: tuple[int, ...]
) -> list[Threshold]:
    """For each stratum, the threshold that selects ``counts[stratum]`` keys.

    Args:
        chunks: returns all groups in chunks of ``CHUNK`` (the last may be shorter); called twice.
        counts: number of groups to select from each stratum, from one to all of them.
    """
    histogram = np.zeros(len(counts) * BINS, dtype=np.int64)
    for bins, _ in _binned(chunks, seed):
        histogram += np.bincount(bins, minlength=len(histogram))
    borders = [_bin_of(part, count) for part, count in zip(histogram.reshape(-1, BINS), counts, strict=True)]
    border_bins = np.array([stratum * BINS + bin_ for stratum, (bin_, _) in enumerate(borders)])
    gathered: list[list[np.ndarray]] = [[] for _ in counts]
    for bins, keys in _binned(chunks, seed):
        for stratum, place in enumerate(border_bins):
            gathered[stratum].append(keys[bins == place])
    return [_threshold(np.concatenate(keys), rank) for keys, (_, rank) in zip(gathered, borders, strict=True)]


def draw(
    chunks: Callable[[], Iterable[Chunk]], limits: list[Threshold], seed: tuple[int, ...]
) -> Iterator[Drawn]:
    """For each chunk: scores [n], strata ([n] or None), and which groups are selected (bool [n])."""
    keys_of = np.array([limit.key for limit in limits])
    ties = [limit.ties for limit in limits]
    for number, (scores, strata) in enumerate(chunks()):
        keys = gumbel_keys(scores, seed, number)
        limit = keys_of[0] if strata is None else keys_of[strata]
        drawn = keys > limit
        for place in np.flatnonzero(keys == limit).tolist():
            stratum = 0 if strata is None else int(strata[place])
            drawn[place] = ties[stratum] > 0
            ties[stratum] -= 1
        yield scores, strata, drawn


def chance_above(level: float | np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The probability that a score with Gumbel noise is above ``level``, float64 [n]."""
    return -np.expm1(-np.exp(np.minimum(scores - level, 50.0)))


def expected_level(scores: np.ndarray, numbers: np.ndarray, count: int) -> float:
    """The level above which ``count`` of the noisy scores are expected (by bisection).

    Args:
        scores: [bins] scores, each of groups with about the same score.
        numbers: [bins] numbers of these groups.

    :func:`chance_above` at this level is a group's probability of being selected, up to a term of the order
    of 1 / count (Rosen 1972), which a report can compare with the selection.
    """
    if count >= numbers.sum():
        return -np.inf
    low, high = float(scores.min()) - 50.0, float(scores.max()) + 50.0
    for _ in range(100):
        middle = (low + high) / 2
        enough = (numbers * chance_above(middle, scores)).sum() >= count
        low, high = (middle, high) if enough else (low, middle)
    return low


def _binned(
    chunks: Callable[[], Iterable[Chunk]], seed: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(stratum * BINS + bin, key) of each group, in chunks; bins are ordered like the keys."""
    for number, (scores, strata) in enumerate(chunks()):
        keys = gumbel_keys(scores, seed, number)
        bits = keys.astype(np.float32).view(np.uint32)
        # Floats sort like integers if the bits of negative ones are inverted.
        ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> 16
        bins = ordered.astype(np.int64)
        if strata is not None:
            bins += strata.astype(np.int64) * BINS
        yield bins, keys


def _bin_of(histogram: np.ndarray, count: int) -> tuple[int, int]:
    """The bin of the ``count``-th largest key, and its rank within the bin (from 1)."""
    if not 1 <= count <= histogram.sum():
        raise ValueError(f"cannot draw {count} of {histogram.sum()}")
    above = np.cumsum(histogram[::-1])[::-1]  # keys in this bin or a higher one
    place = int(np.flatnonzero(above >= count)[-1])
    return place, count - int(above[place] - histogram[place])


def _threshold(keys: np.ndarray, rank: int) -> Threshold:
    key = float(np.partition(keys, len(keys) - rank)[len(keys) - rank])
    return Threshold(key, rank - int((keys > key).sum()))
