"""When a run stops before its last iteration: a signal, a time limit, an interval."""

import signal
import time
from argparse import Namespace

from megatron_ext.training.distributed import agree_max


class Stopping:
    """Watches for reasons to stop and lets all ranks agree on them.

    The exit signal (SIGTERM unless ``--exit-signal`` says otherwise) and SIGUSR1, which SLURM can
    send ahead of a time limit, ask for a save and an orderly end. A second one ends at once.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.start = time.time()
        self.received: str | None = None
        self.signals = {args.exit_signal, signal.SIGUSR1}
        self.previous = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number: int, frame) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number).name

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def reason(self, iteration: int) -> str | None:
        """Why all ranks stop now, or None; a collective call."""
        limit = self.args.exit_duration_in_mins
        overtime = limit is not None and time.time() - self.start > limit * 60
        signalled, overtime = agree_max([float(bool(self.received)), float(overtime)])
        if signalled:
            return f"received {self.received or 'a signal on another rank'}"
        if overtime:
            return f"ran for {limit} minutes (--exit-duration-in-mins)"
        interval = self.args.exit_interval
        if interval and iteration % interval == 0:
            return f"reached iteration {iteration} (--exit-interval)"
        return None
