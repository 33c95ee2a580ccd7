"""The frame of the command lines in tools/: exit codes, and one-line errors for bad input.

    from megatron_ext.common import command

    def main(argv: list[str] | None = None) -> int:
        ...                         # read flags, work, print; raise an error
    main = command.tool(main)       # or as a decorator

A tool exits with 0 if all output was written; with 1 and one line, ``NAME: error: ...``, for bad input;
with 2 for bad usage (argparse); with 130 after Ctrl-C and 143 after SIGTERM, its temporary files put away;
silently with 141 if its output is a closed pipe, as in ``tool | head``. Readers raise one of ``EXPECTED``,
naming their file; any other exception is a bug in the program and keeps its traceback.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, TypeVar, cast

from megatron_ext.common.errors import RunError
from megatron_ext.common.flags import add_flags

#: Errors of files, flags and machines. MemoryError: the requested work is too large.
EXPECTED = (ValueError, OSError, RunError, MemoryError)
_MAX_MESSAGE = 10_000
INTERRUPTED, CLOSED_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class Options(Protocol):
    """A dataclass with the options of a library function."""

    def problems(self) -> list[str]:
        """Invalid values and combinations, one sentence each, by the names of the flags."""
        ...


T = TypeVar("T")
OptionsT = TypeVar("OptionsT", bound=Options)


def tool(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap ``main(argv)`` with the exit codes above; the tool's name is that of its file."""
    name = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def framed(argv: list[str] | None = None) -> int:
        open_missing_streams()
        try:
            with _termination_raised():
                code = main(argv)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt as stop:
            word, code = (
                ("terminated", TERMINATED) if isinstance(stop, Terminated) else ("interrupted", INTERRUPTED)
            )
            return _end(f"{name}: {word}" + f"; {stop}" * bool(str(stop)), code)
        except EXPECTED as error:
            if isinstance(error, BrokenPipeError) and _reader_has_gone():
                return _end(None, CLOSED_PIPE)
            return _end(f"{name}: error: {message(error)}", 1)

    return framed


@contextlib.contextmanager
def _termination_raised() -> Iterator[None]:
    """Within it SIGTERM raises Terminated in the main thread, unless something handles it already."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it twice
        raise Terminated

    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def open_missing_streams() -> None:
    """Redirect closed standard output and error (``>&-``, as under some daemons) to the null device.

    Otherwise the next opened file would get their descriptor, and with it the output of libraries.
    ``sys.stdin`` stays None, so that readers of standard input can report that it is closed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor: this one
        if number and getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for good


def message(error: BaseException) -> str:
    """The message of an expected error for the user, truncated if it is very long."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory {error}".rstrip()
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip() or type(error).__name__
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]} ..."


def parser(
    description: str | None, usage: str | None = None, options: type | None = None
) -> argparse.ArgumentParser:
    """A parser with the tool's docstring as its help, and without abbreviated flags.

    ``options``: a dataclass whose fields are flags (``flags.py``).
    """
    made = argparse.ArgumentParser(
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if options is not None:
        add_flags(made, options)
    return made


def read(
    parser: argparse.ArgumentParser, argv: list[str] | None, kind: type[OptionsT], **within: type
) -> tuple[OptionsT, argparse.Namespace]:
    """Parse a command line into options; their ``problems()`` are reported as bad usage.

    ``within`` are the classes of fields of ``kind`` that are dataclasses of flags themselves. Returns the
    options and the parsed flags.
    """
    typed = parser.parse_args(argv)
    options = made(kind, typed, **{name: made(inner, typed) for name, inner in within.items()})
    if problems := options.problems():
        parser.error("; ".join(problems))
    return options, typed


def made(kind: type[T], typed: argparse.Namespace, **more: Any) -> T:
    """Create a dataclass from the flags with its fields' names, and ``more``."""
    names = {field.name for field in dataclasses.fields(cast(Any, kind))}
    return kind(**{name: value for name, value in vars(typed).items() if name in names} | more)


def _end(line: str | None, code: int) -> int:
    """Flush, and print ``line``. Unwritable output is dropped, so that Python's exit is silent."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)
    return code


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe without a reader."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # not a file, as under pytest
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _quiet_while_importing(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The default excepthook, but silent for Ctrl-C during the imports, which can take seconds."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet_while_importing
