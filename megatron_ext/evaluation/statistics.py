"""How far a mean over items can be trusted, and whether two models differ beyond chance.

Items are drawn again with replacement (Efron's bootstrap); two models are compared on the same draws of the
same items, so that what makes an item hard for both cancels out. Draws are seeded: a number is what it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Draws; the error of an error is then about 2 %, and the smallest p-value 0.0002.
DRAWS = 10_000
_AT_ONCE = 1 << 22
_SEED = 0


def mean(values: Sequence[float]) -> float:
    """The plain mean, summed in order, as lm-evaluation-harness has it."""
    return sum(values) / len(values)


def bootstrap_means(values: Sequence[float]) -> np.ndarray:
    """The mean of each draw of as many items, [DRAWS]."""
    items = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(_SEED)
    means = np.empty(DRAWS)
    step = max(1, _AT_ONCE // len(items))
    for start in range(0, DRAWS, step):
        count = min(step, DRAWS - start)
        means[start : start + count] = items[generator.integers(len(items), size=(count, len(items)))].mean(1)
    return means


def bootstrap_error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return float(bootstrap_means(values).std(ddof=1)) if len(values) > 1 else float("nan")


@dataclass(frozen=True)
class Difference:
    """The mean of b - a over items that both answered.

    Attributes:
        low, high: the middle 95 % of the draws.
        p: how likely a difference as large is, either way, if there were none.
    """

    items: int
    mean: float
    low: float
    high: float
    p: float


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare two models item by item."""
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    means = bootstrap_means(differences.tolist())
    low, high = np.percentile(means, [2.5, 97.5])
    # Of a difference of 0 half the draws lie on either side; 1 is added as no p-value is 0.
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (DRAWS + 1))
    return Difference(len(differences), float(differences.mean()), float(low), float(high), float(p))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which hypotheses of several are rejected, so that none is by chance but with ``level`` (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(order) - rank):
            break
        rejected[index] = True
    return rejected


def signal_to_noise(means: Sequence[float], error: float) -> float:
    """How far a number moved over the checkpoints of a run, against its error.

    The signal is the change from the first to the last checkpoint. The noise of a difference of two means is
    sqrt(2) times ``error``, the bootstrap error of one.
    """
    return abs(means[-1] - means[0]) / (2**0.5 * error) if error else float("inf")
