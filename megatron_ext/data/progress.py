"""How far long work over many samples is: a bar on a terminal, plain lines elsewhere."""

import sys
import time

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts samples to ``total`` and writes to stderr.

    Args:
        what: begins each line, such as "recorded".
        total: samples to count.
        done: those that are done already.
        active: False says nothing.
    """

    def __init__(self, what: str, total: int, done: int = 0, active: bool = True):
        self.what, self.total, self.done, self.first, self.active = what, total, done, done, active
        self.started = self.said = time.monotonic()
        self.bar = None
        if active and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit=" samples", unit_scale=True, dynamic_ncols=True)

    def at(self, done: int) -> None:
        """So many are done."""
        step, self.done = done - self.done, done
        if self.bar is not None:
            self.bar.update(step)
            return
        now = time.monotonic()
        if self.active and now - self.said >= SECONDS_BETWEEN_LINES:
            self.said = now
            speed = (done - self.first) / (now - self.started)
            left = f", {(self.total - done) / speed:,.0f} s left" if speed else ""
            line = f"{self.what} {done:,} of {self.total:,} ({done / self.total:.0%}), {speed:,.1f}/s{left}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal to others."""
        if self.bar is not None:
            self.bar.close()
