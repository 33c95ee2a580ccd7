"""Unsupported and unknown flags: reasons and suggestions."""

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from megatron_ext.common.flags import argparse_form
from megatron_ext.config import options

UPSTREAM = "Megatron-LM 0.16.1"


@cache
def known_to_upstream() -> dict[str, str]:
    """Flag -> reason, for Megatron-LM's flags that are not supported here (``unsupported.txt``)."""
    reasons: dict[str, str] = {}
    reason = ""
    for line in Path(__file__).with_name("unsupported.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") or not line.strip():
            continue
        if line.startswith("--"):
            reasons |= dict.fromkeys(line.split(), reason)
        else:
            reason = line.strip()
    return reasons


@cache
def spellings() -> tuple[str, ...]:
    """All supported spellings of flags."""
    return tuple(name for option in options().values() for name in argparse_form(option)[0])


def problems(unknown: Sequence[str]) -> list[str]:
    """One sentence for each unknown word of the command line."""
    sentences, of_refused_flag = [], False
    for word in unknown:
        if word.startswith("--"):
            of_refused_flag = True
            sentences.append(_about_flag(word.split("=")[0]))
        elif not of_refused_flag:
            sentences.append(f"{word!r} belongs to no flag{_quoting_hint(word)}")
    return sentences


def _about_flag(name: str) -> str:
    reason = known_to_upstream().get(name)
    if reason:
        return f"{name} is known to {UPSTREAM} but not supported here: {reason}"
    candidates = (*spellings(), *known_to_upstream())
    close = difflib.get_close_matches(name.replace("_", "-"), candidates, n=1, cutoff=0.6)
    return f"{name} is not a flag of this program" + (f"; did you mean {close[0]}?" if close else "")


def _quoting_hint(word: str) -> str:
    return " (a flag and its value quoted as one word?)" if " --" in f" {word}" else ""
