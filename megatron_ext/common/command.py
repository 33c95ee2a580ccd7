"""The frame of the command lines in tools/: how they end, whatever is wrong with their input.

    from megatron_ext.common import command

    def main(argv: list[str] | None = None) -> int:
        ...                         # read flags, work, print; raise what is wrong
    main = command.tool(main)       # or as a decorator

A tool ends with 0 when its whole output is in place; with 1 and one line, ``NAME: error: ...``, for
bad input; with 2 for bad usage (argparse); with 130 after Ctrl-C; quietly with 141 when the reader of
its output has gone, as in ``tool | head``. Readers raise one of ``EXPECTED``, naming their file: any
other exception is a fault of the program and keeps its traceback.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

from megatron_ext.common.errors import RunError
from megatron_ext.common.flags import add_flags

#: What can be wrong with files, flags and machines. MemoryError: what was asked for is too large.
EXPECTED = (ValueError, OSError, RunError, MemoryError)
_LONGEST = 10_000
INTERRUPTED, CLOSED_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE


class Options(Protocol):
    """A dataclass of what a library function is asked to do."""

    def problems(self) -> list[str]:
        """What cannot be meant, one sentence each, by the names of the flags."""
        ...


Made = TypeVar("Made")
Asked = TypeVar("Asked", bound=Options)


def tool(main: Callable[..., int]) -> Callable[..., int]:
    """``main(argv)`` with the ends above; the tool's name is that of its file."""
    name = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def framed(argv: list[str] | None = None) -> int:
        open_missing_streams()
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt as stop:
            return _end(f"{name}: interrupted" + f"; {stop}" * bool(str(stop)), INTERRUPTED)
        except EXPECTED as error:
            if isinstance(error, BrokenPipeError) and _reader_has_gone():
                return _end(None, CLOSED_PIPE)
            return _end(f"{name}: error: {message(error)}", 1)

    return framed


def open_missing_streams() -> None:
    """Lead standard output and error that were closed (``>&-``, as under some daemons) nowhere.

    Else the next file that is opened would take their number, and get what libraries print. Who reads
    standard input says that it is closed: ``sys.stdin`` stays None.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if number and getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for good


def message(error: BaseException) -> str:
    """What an expected error says to a user; of a text without end, its beginning."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory {error}".rstrip()
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    said = str(error).strip() or type(error).__name__
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."


def parser(
    description: str | None, usage: str | None = None, options: type | None = None
) -> argparse.ArgumentParser:
    """A parser whose help is the tool's docstring as it stands, and that takes no abbreviated flags.

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
    parser: argparse.ArgumentParser, argv: list[str] | None, kind: type[Asked], **within: type
) -> tuple[Asked, argparse.Namespace]:
    """What a command line asks for, and all that was typed; its ``problems()`` are bad usage.

    ``within`` are the classes of fields of ``kind`` that are dataclasses of flags themselves.
    """
    typed = parser.parse_args(argv)
    asked = made(kind, typed, **{name: made(inner, typed) for name, inner in within.items()})
    if problems := asked.problems():
        parser.error("; ".join(problems))
    return asked, typed


def made(kind: type[Made], typed: argparse.Namespace, **more: Any) -> Made:
    """An instance of a dataclass from the flags of its fields' names, and ``more``."""
    names = {field.name for field in dataclasses.fields(cast(Any, kind))}
    return kind(**{name: value for name, value in vars(typed).items() if name in names} | more)


def _end(line: str | None, code: int) -> int:
    """Say the last word. What standard output cannot take is dropped: Python's own end would tell of it."""
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
    """Whether it is standard output that is a pipe which nobody reads."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is not a file, as under pytest
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _quiet_while_importing(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Python's last resort, but for Ctrl-C before ``main`` runs: imports take seconds on a busy machine."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet_while_importing
