"""The forgetting curve: a model's loss on its training samples, in training order.

The motivation of multiple-round training (arXiv 2402.02791, section 3): at the end of training, the loss is
higher on early samples than on late ones.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.common.files import write_picture
from megatron_ext.data.rounds.loss_record import Losses
from megatron_ext.data.rounds.sampling import CHUNK


@dataclass(frozen=True)
class Curve:
    """Means over equal intervals of the training order."""

    place: np.ndarray  # [points] number of the interval's middle sample
    loss: np.ndarray  # [points] mean loss of its tokens, nats; NaN without tokens
    error: np.ndarray  # [points] standard error of the mean over its samples

    def ends(self) -> tuple[float, float]:
        """Mean losses of the first and of the last tenth."""
        tenth = max(1, len(self.loss) // 10)
        return float(np.nanmean(self.loss[:tenth])), float(np.nanmean(self.loss[-tenth:]))


def curve(losses: Losses, points: int) -> Curve:
    """The curve in ``points`` intervals (fewer if there are fewer samples), in constant memory.

    Losses that are not finite are ignored.
    """
    samples = len(losses.losses)
    points = min(points, samples)
    sums = np.zeros((5, points))  # weight, weight * loss, number, loss, loss^2
    for begin in range(0, samples, CHUNK):
        values = np.asarray(losses.losses[begin : begin + CHUNK], dtype=np.float64)
        weights = np.ones(len(values))
        if losses.tokens is not None:
            weights = np.maximum(losses.tokens[begin : begin + CHUNK], 0).astype(np.float64)
        where = np.arange(begin, begin + len(values)) * points // samples
        good = np.isfinite(values) & (weights > 0)
        where, values, weights = where[good], values[good], weights[good]
        for row, terms in enumerate((weights, weights * values, np.ones(len(values)), values, values**2)):
            sums[row] += np.bincount(where, terms, minlength=points)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums[1] / sums[0]
        variance = np.maximum(sums[4] / sums[2] - (sums[3] / sums[2]) ** 2, 0)
        error = np.sqrt(variance / sums[2])
    return Curve((np.arange(points) + 0.5) * samples / points, mean, error)


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Draw the curves with a band of one standard error. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, each in curves.items():
        [line] = axes.plot(each.place, each.loss, linewidth=1.2, label=name)
        low, high = each.loss - each.error, each.loss + each.error
        axes.fill_between(each.place, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="sample, in the order of training", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(figure, path)
    pyplot.close(figure)
