"""Loss spikes: values far above the losses of the last iterations."""

import math
import statistics
from collections import deque

WINDOW, MIN_LOSSES = 100, 20
#: How many standard deviations above the window's mean, and by which factor above its largest value.
DEVIATIONS, FACTOR = 6.0, 1.1


class SpikeDetector:
    """Compares each loss with the ``WINDOW`` losses before it, once there are ``MIN_LOSSES``.

    A spike exceeds the largest loss of the window by ``FACTOR`` and its mean by ``DEVIATIONS``: noise
    exceeds neither, and a falling or slowly rising loss does not exceed the second. A spike is not added to
    the window, unless ``MIN_LOSSES`` of them in a row show that the loss has reached another level.
    """

    def __init__(self) -> None:
        self.window: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0

    def check(self, loss: float) -> str | None:
        """Add a loss; if it is a spike, returns a description of the usual losses. NaN is not a spike."""
        if not math.isfinite(loss):
            return None
        usual = None
        if len(self.window) >= MIN_LOSSES:
            mean, deviation = statistics.fmean(self.window), statistics.pstdev(self.window)
            if loss > mean + DEVIATIONS * deviation and loss > FACTOR * max(self.window):
                usual = f"the last {len(self.window)} were {mean:.4f} +- {deviation:.4f}"
        self.in_a_row = self.in_a_row + 1 if usual else 0
        if self.in_a_row >= MIN_LOSSES:
            self.window.clear()
        if usual is None or self.in_a_row >= MIN_LOSSES:
            self.window.append(loss)
        return usual
