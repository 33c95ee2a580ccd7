"""What a run writes beside training: logs, boards, profiles. When one of them fails, training goes on.

A full disk, a closed pipe, a folder that was removed: it is said once, on a stream that still works, and
tried again later. Imports nothing heavy.
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

#: Until something that failed is tried again: at first, and after it has failed again and again.
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 30.0, 1800.0
#: Lines of a file that wait for a disk with room.
MOST_WAITING = 10_000
_LONGEST_LINE = 1 << 20


class Side:
    """Something beside training that may fail; ``name`` says what, such as the flag that asked for it."""

    def __init__(self, name: str):
        self.name = name
        self._failing, self._retry_at, self._pause = False, 0.0, RETRY_SECONDS

    def attempt(self, action: Callable[[], object], now: bool = False) -> bool:
        """Do it; returns whether it was done. What failed is passed over for a while, unless ``now``."""
        if self._failing and not now and time.monotonic() < self._retry_at:
            return False
        try:
            action()
        except Exception as error:  # of a library: no list would hold all of them
            if not self._failing:
                reason = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                tell(f"WARNING: {self.name}: {reason}: training goes on without it")
            self._pause = min(2 * self._pause, LONGEST_RETRY_SECONDS) if self._failing else RETRY_SECONDS
            self._failing, self._retry_at = True, time.monotonic() + self._pause
            return False
        if self._failing:
            tell(f"{self.name} works again")
        self._failing = False
        return True


class LinesFile:
    """A file that lines are appended to, and that ends in a whole one whenever others read it.

    Lines that cannot be written wait, the newest 10,000 of them, until they can be. The file is made
    again if it was removed; half a JSON object that a killed run left at its end is cut off.
    """

    def __init__(self, path: str | os.PathLike[str], name: str):
        self.path, self._side = Path(path), Side(f"{name} {path}")
        self._descriptor: int | None = None
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._torn = False

    def open(self) -> "LinesFile":
        """Make the file, before there is a line."""
        self._side.attempt(self._flush)
        return self

    def write(self, line: str) -> None:
        """Append a line, which is given without its end."""
        self._waiting.append(line.encode() + b"\n")
        self._side.attempt(self._flush)

    def close(self) -> None:
        """Write what waits, if it can be, and let go of the file."""
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
        end = os.pread(descriptor, _LONGEST_LINE, max(0, size - _LONGEST_LINE)) if size else b""
        torn = end.rpartition(b"\n")[2]
        self._torn = bool(torn)
        if torn.startswith(b"{") and not _is_json(torn):
            os.ftruncate(descriptor, size - len(torn))  # half a record, of a run that was killed
            self._torn = False
        return descriptor

    def _append(self, descriptor: int, data: bytes) -> None:
        size = os.fstat(descriptor).st_size
        left = memoryview(b"\n" + data if self._torn else data)
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            with contextlib.suppress(OSError):  # what is no file cannot be cut
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
    """Standard output or error that drops what it cannot write, and says so once on the other one.

    All else is that of ``stream``. ``failing``: what was written up to the last flush did not get through.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name
        self.failing = self._told = self._dropped = False

    def write(self, text: str) -> int:
        """Write, or drop; returns how much was given."""
        if not self._attempt(lambda: self._stream.write(text)):
            self._dropped = True
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Each of them as ``write`` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or leave it for the next time."""
        if self._attempt(self._stream.flush) and not self._dropped:
            self.failing = False
        self._dropped = False

    def _attempt(self, action: Callable[[], object]) -> bool:
        try:
            action()
            return True
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.failing = True
            if not self._told:
                self._told = True
                tell(f"WARNING: {self._name}: {error}: training goes on; what cannot be written is dropped")
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Within it, and when Python ends after it, standard output and error cannot end the program."""
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
    """Let what is left in a stream's buffer go nowhere: it would be the exit code of Python's end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(text: str) -> None:
    """Say it on standard error, or, where that fails, on standard output."""
    for stream in (sys.stderr, sys.stdout):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(text, file=stream, flush=True)
            if not getattr(stream, "failing", False):
                return
