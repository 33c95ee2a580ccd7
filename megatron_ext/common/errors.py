"""The errors that end a run with one clear line instead of a traceback; imports nothing heavy."""

import signal


class RunError(RuntimeError):
    """The run cannot continue; the message says why and what to do. Raised alike on every rank."""


class LostProcess(RunError):
    """Another process of the job failed, was killed, or does not answer."""


class Interrupted(KeyboardInterrupt):
    """A signal came during set-up, before there was anything to save; ``code`` is the exit code."""

    def __init__(self, number: int):
        super().__init__(
            f"received {signal.Signals(number).name} during set-up: there is nothing to save yet"
        )
        self.code = 128 + number
