"""The errors that end a run with one clear line instead of a traceback; imports nothing heavy."""

import signal


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line: never empty, and in words for a missing key."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


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
