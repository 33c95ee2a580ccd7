"""Side outputs of training: logs, boards, profiles. If one of them fails, training goes on.

A failure (a full disk, a closed pipe, a removed folder) is reported once, on a stream that still works, and
the output is retried later. Imports nothing heavy.
"""

import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_ext.common.command import open_missing_streams

#: Delay until the first retry, and the largest delay after repeated failures.
RETRY_SECONDS, MAX_RETRY_SECONDS = 30.0, 1800.0
#: Lines that a file buffers while it cannot be written.
MAX_WAITING = 10_000
_MAX_LINE = 1 << 20


class Side:
    """A side output that may fail; ``name`` identifies it in messages, such as the flag that enables it."""

    def __init__(self, name: str):
        self.name = name
        self._failing, self._retry_at, self._pause = False, 0.0, RETRY_SECONDS

    def attempt(self, action: Callable[[], object], now: bool = False) -> bool:
        """Run ``action``; returns whether it succeeded. A failed one is retried later, or ``now``."""
        if self._failing and not now and time.monotonic() < self._retry_at:
            return False
        try:
            action()
        except Exception as error:  # libraries raise anything
            if not self._failing:
                reason = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                report(f"WARNING: {self.name}: {reason}: training goes on without it")
            self._pause = min(2 * self._pause, MAX_RETRY_SECONDS) if self._failing else RETRY_SECONDS
            self._failing, self._retry_at = True, time.monotonic() + self._pause
            return False
        if self._failing:
            report(f"{self.name} works again")
        self._failing = False
        return True


class LinesFile:
    """A file of appended lines, whose last line is complete whenever another process reads it.

    Lines that cannot be written are buffered, the newest 10,000 of them, and retried. The file is recreated
    if it was removed; an incomplete JSON object that a killed run left at its end is cut off.
    """

    def __init__(self, path: str | os.PathLike[str], name: str):
        self.path, self._side = Path(path), Side(f"{name} {path}")
        self._descriptor: int | None = None
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._torn = False

    def open(self) -> "LinesFile":
        """Create the file before the first line."""
        self._side.attempt(self._flush)
        return self

    def write(self, line: str) -> None:
        """Append a line, given without its newline."""
        self._waiting.append(line.encode() + b"\n")
        self._side.attempt(self._flush)

    def close(self) -> None:
        """Try to write the buffered lines, and close the file."""
        if self._waiting:
            self._side.attempt(self._flush, now=True)
        self._close()

    def _flush(self) -> None:
        try:
            if self._descriptor is not None and os.fstat(self._descriptor).st_nlink == 0:
                self._close()
            descriptor = self._open() if self._descriptor is None else self._descriptor
            self._append(descriptor, b"".join(self._waiting))
        except OSError:
            self._close()
            raise
        self._waiting.clear()

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._descriptor = descriptor
        size = os.fstat(descriptor).st_size
        end = os.pread(descriptor, _MAX_LINE, max(0, size - _MAX_LINE)) if size else b""
        torn = end.rpartition(b"\n")[2]
        self._torn = bool(torn)
        if torn.startswith(b"{") and not _is_json(torn):
            os.ftruncate(descriptor, size - len(torn))  # the incomplete record of a killed run
            self._torn = False
        return descriptor

    def _append(self, descriptor: int, data: bytes) -> None:
        size = os.fstat(descriptor).st_size
        left = memoryview(b"\n" + data if self._torn else data)
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            with contextlib.suppress(OSError):  # not a regular file
                os.ftruncate(descriptor, size)
            raise
        self._torn = False

    def _close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = None


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


class SteadyStream:
    """Standard output or error that drops what it cannot write, and reports this once on the other one.

    Other attributes are those of ``stream``. ``failing``: text before the last flush was lost.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name
        self.failing = self._reported = self._dropped = False

    def write(self, text: str) -> int:
        """Write or drop ``text``; returns its length."""
        if not self._attempt(lambda: self._stream.write(text)):
            self._dropped = True
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or retry at the next flush."""
        if self._attempt(self._stream.flush) and not self._dropped:
            self.failing = False
        self._dropped = False

    def _attempt(self, action: Callable[[], object]) -> bool:
        try:
            action()
            return True
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.failing = True
            if not self._reported:
                self._reported = True
                report(f"WARNING: {self._name}: {error}: training goes on; what cannot be written is dropped")
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Inside the context and at Python's exit, errors of standard output and error are not fatal."""
    open_missing_streams()
    streams = sys.stdout, sys.stderr
    sys.stdout = SteadyStream(sys.stdout, "standard output")
    sys.stderr = SteadyStream(sys.stderr, "standard error")
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (sys.stdout, sys.stderr):
            if getattr(stream, "failing", False):
                _silence(stream)
        sys.stdout, sys.stderr = streams


def _silence(stream: TextIO | SteadyStream) -> None:
    """Discard the rest of a stream's buffer: otherwise flushing it at exit would change the exit code."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def report(text: str) -> None:
    """Print to standard error, or, if that fails, to standard output."""
    for stream in (sys.stderr, sys.stdout):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(text, file=stream, flush=True)
            if not getattr(stream, "failing", False):
                return
