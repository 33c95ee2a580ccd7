"""Broken inputs from sound ones, and a child process to feed them to: a crash or a hang is a result."""

import contextlib
import mmap
import os
import pickle
import random
import resource
import signal
import struct
from collections.abc import Callable

#: Numbers that parsers stumble over.
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
MEMORY = 12 << 30
#: Of the processor's time, which is the same on a busy machine; and of waiting for something for ever.
SECONDS_A_CASE, WAITED_SECONDS_A_CASE = 20, 600


def mutate(data: bytes, rng: random.Random, dictionary: tuple[bytes, ...] = ()) -> bytes:
    """``data`` with one to four changes: bits, bytes, numbers, pieces cut out, doubled, moved or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _change(changed, rng, dictionary)
    return bytes(changed)


def _change(data: bytearray, rng: random.Random, dictionary: tuple[bytes, ...]) -> None:
    at = rng.randrange(len(data) + 1)
    length = min(len(data) - at, rng.choice((1, 2, 4, 8, 64, 1024)))
    kind = rng.randrange(8)
    if kind == 0 and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1 and data:
        data[at % len(data)] = rng.randrange(256)
    elif kind == 2:
        number = rng.choice(_NUMBERS)
        packed = struct.pack("<Q", number)[: rng.choice((1, 2, 4, 8))]
        data[at : at + len(packed)] = packed
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        data[at:at] = data[at : at + length]
    elif kind == 5:
        del data[at:]
    elif kind == 6 and dictionary:
        data[at:at] = rng.choice(dictionary)
    else:
        data[at:at] = rng.randbytes(length or 1)


def survive(cases: int, seed: str, case: Callable[[random.Random], str]) -> dict[str, int]:
    """Run ``case(rng)`` so many times in a child; how often it returned each outcome.

    ``case`` raises AssertionError for a silent wrong result. Any other exception, a crash, a case
    that takes longer than ``SECONDS_A_CASE`` or more than ``MEMORY`` fails, naming the case.
    """
    place = mmap.mmap(-1, 8)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _run(cases, seed, case, place, writing)
    os.close(writing)
    with open(reading, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    number = struct.unpack("<Q", place[:8])[0]
    if status != 0:
        code = os.waitstatus_to_exitcode(status)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise AssertionError(f"case {number} of seed {seed!r} ended the process with {how}")
    outcomes, problem = pickle.loads(answer)
    assert problem is None, f"case {number} of seed {seed!r}: {problem}"
    return outcomes


def _run(cases: int, seed: str, case: Callable, place: mmap.mmap, writing: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    outcomes: dict[str, int] = {}
    problem = None
    try:
        for number in range(cases):
            place[:8] = struct.pack("<Q", number)
            signal.setitimer(signal.ITIMER_PROF, SECONDS_A_CASE)
            signal.alarm(WAITED_SECONDS_A_CASE)
            outcome = case(random.Random(f"{seed} {number}"))
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    with contextlib.suppress(OSError), open(writing, "wb") as stream:
        pickle.dump((outcomes, problem), stream)
    os._exit(0)
