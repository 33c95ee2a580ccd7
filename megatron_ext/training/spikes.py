"""Loss spikes: values far above what the last iterations were like."""

import math
import statistics
from collections import deque

WINDOW, LEAST = 100, 20
#: How many standard deviations above the window's mean, and by which factor above its largest value.
DEVIATIONS, FACTOR = 6.0, 1.1


class SpikeDetector:
    """Compares each loss with the ``WINDOW`` before it; says nothing before it has seen ``LEAST``.

    A spike is above the largest of the window by ``FACTOR`` and above its mean by ``DEVIATIONS``:
    noise passes neither, a falling or slowly rising loss not the second. It does not enter the
    window, until so many came in a row that the run is on another level.
    """

    def __init__(self) -> None:
        self.window: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0

    def see(self, loss: float) -> str | None:
        """Take in a loss; what was usual, in words, if it is a spike. NaN is no spike."""
        if not math.isfinite(loss):
            return None
        usual = None
        if len(self.window) >= LEAST:
            mean, deviation = statistics.fmean(self.window), statistics.pstdev(self.window)
            if loss > mean + DEVIATIONS * deviation and loss > FACTOR * max(self.window):
                usual = f"the last {len(self.window)} were {mean:.4f} +- {deviation:.4f}"
        self.in_a_row = self.in_a_row + 1 if usual else 0
        if self.in_a_row >= LEAST:
            self.window.clear()
        if usual is None or self.in_a_row >= LEAST:
            self.window.append(loss)
        return usual
