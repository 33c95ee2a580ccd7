"""The errors that end a run with one clear line instead of a traceback; imports nothing heavy."""


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do. The same on every rank."""


class LostProcess(RunError):
    """Another process of the job failed, was killed, or does not answer."""
