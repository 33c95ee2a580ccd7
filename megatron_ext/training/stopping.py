"""When a run stops before its last iteration: a signal, a time limit, an interval."""

import os
import signal
import threading
import time
from argparse import Namespace

from megatron_ext.training.distributed import agree_max, flush

#: Launchers pass on the signal that they got too: within this time it is the same request.
SAME_REQUEST_SECONDS = 2.0


class Stopping:
    """Watches for reasons to stop and lets all ranks agree on them.

    The exit signal (SIGTERM unless ``--exit-signal`` says otherwise) and SIGUSR1, which SLURM can
    send ahead of a time limit, ask for a save and an orderly end. A second one, two seconds later
    or more, ends at once with exit code 128 + its number, even where the process waits in a
    collective: Python's own handlers would run only after it.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.start = time.time()
        self.received: str | None = None
        self._received_at = 0.0
        self.signals = {args.exit_signal, signal.SIGUSR1}
        self.previous = {number: signal.signal(number, self._receive) for number in self.signals}
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def _receive(self, number: int, frame) -> None:
        """Nothing: the thread does it; but a signal needs a handler for its byte to reach the pipe."""

    def _listen(self) -> None:
        while number := os.read(self._pipe[0], 1)[0]:
            if number not in self.signals:
                continue
            if self.received is None:
                self._received_at = time.monotonic()
                self.request(signal.Signals(number).name)
            elif time.monotonic() - self._received_at > SAME_REQUEST_SECONDS:
                print(f"second signal ({signal.Signals(number).name}): ending without a save", flush=True)
                flush()
                os._exit(128 + number)

    def request(self, why: str) -> None:
        """Ask for a save and an orderly end at the next occasion, for a reason of this rank's own."""
        self.received = self.received or why

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)

    def requested(self) -> bool:
        """Whether any rank was asked to stop; a collective call."""
        return bool(agree_max([float(self.received is not None)])[0])

    def reason(self, iteration: int) -> str | None:
        """Why all ranks stop now, or None; a collective call."""
        limit = self.args.exit_duration_in_mins
        overtime = limit is not None and time.time() - self.start > limit * 60
        signalled, overtime = agree_max([float(self.received is not None), float(overtime)])
        if signalled:
            return f"received {self.received or 'a signal on another rank'}"
        if overtime:
            return f"ran for {limit} minutes (--exit-duration-in-mins)"
        interval = self.args.exit_interval
        if interval and iteration % interval == 0:
            return f"reached iteration {iteration} (--exit-interval)"
        return None
