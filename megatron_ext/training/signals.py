"""Signals that stop a run: the first one orderly, the second at once.

Imports nothing heavy, so that signals are handled from the first line of the program on.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from types import FrameType
from typing import Any

from megatron_ext.common.errors import Interrupted

#: SLURM can send it ahead of a time limit: the set-up and an iteration still have time to finish.
AHEAD_OF_TIME = signal.SIGUSR1
#: SIGINT is Ctrl-C, SIGHUP a closed terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, AHEAD_OF_TIME)
#: Launchers forward a signal that their processes also received: within this time it is the same request.
SAME_REQUEST_SECONDS = 2.0
#: The same without a launcher, where only programs like ``timeout`` send a signal twice.
SAME_REQUEST_ALONE_SECONDS = 0.5
#: If the main thread is in an uninterruptible call of the set-up, the process is ended after this time.
SET_UP_SECONDS = 3.0


class StopSignals:
    """Handles the signals that stop a run; a context manager for the main thread.

    Until ``begin`` there is nothing to save: the first signal raises Interrupted in the main thread, and the
    process is ended after three seconds if it is still running. After ``begin`` the first signal requests a
    save and an orderly end, through ``received``; SIGUSR1 always does. A second signal ends the process at
    once with exit code 128 + its number, even if the main thread waits in a collective, where Python's own
    handlers would run only afterwards.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._in_set_up, self._interrupted, self._number = True, False, 0
        self._previous: dict[int, Any] = {}
        self._timer: threading.Timer | None = None
        launched = not {"LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_ID"}.isdisjoint(os.environ)
        self._same_request = SAME_REQUEST_SECONDS if launched else SAME_REQUEST_ALONE_SECONDS

    def __enter__(self) -> "StopSignals":
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            # Under nohup SIGHUP stays ignored, so that the run outlives its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self.answer(number)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        _installed.add(self)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Restore the previous handlers."""
        _installed.discard(self)
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)
        if self._timer is not None:
            self._timer.cancel()
        if self._interrupted and isinstance(error, Exception):  # raised because of Interrupted
            raise Interrupted(self._number) from error

    def answer(self, number: int) -> None:
        """Handle ``number`` as a stop signal too (``--exit-signal``)."""
        if number not in self._previous:
            self._previous[number] = signal.signal(number, self._receive)

    def begin(self) -> None:
        """From now on there is something to save: a signal is a request to stop."""
        self._in_set_up = False

    def request(self, why: str) -> None:
        """Request a save and an orderly end, for the reason ``why``."""
        self.received = self.received or why

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        """The handler, in the main thread. Without a handler no byte would reach the pipe."""
        if self._ends_set_up(number) and not self._interrupted:
            self._interrupted, self._number = True, number
            raise Interrupted(number)

    def _ends_set_up(self, number: int) -> bool:
        return self._in_set_up and number != AHEAD_OF_TIME

    def _listen(self) -> None:
        while number := os.read(self._pipe[0], 1)[0]:
            if number not in self._previous:
                continue
            name = signal.Signals(number).name
            if self.received is None:
                self._received_at = time.monotonic()
                self.request(name)
                if self._ends_set_up(number):
                    self._timer = threading.Timer(SET_UP_SECONDS, self._end_set_up, [number])
                    self._timer.daemon = True
                    self._timer.start()
                elif os.environ.get("RANK", "0") == "0":
                    _say(f"received {name}: stopping in order; a second one ends the run at once")
            elif time.monotonic() - self._received_at > self._same_request:
                _say(f"second signal ({name}): ending without a save")
                os._exit(128 + number)

    def _end_set_up(self, number: int) -> None:
        if self._in_set_up:
            _say(str(Interrupted(number)))
            os._exit(128 + number)


def _say(text: str) -> None:
    """Print to standard error only: a blocked standard output must not delay the end."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        print(text, file=sys.stderr, flush=True)


_installed: "weakref.WeakSet[StopSignals]" = weakref.WeakSet()


def _release_in_child() -> None:
    # Otherwise a signal to a data worker would reach the trainer through the pipe that both share.
    if _installed:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_release_in_child)
