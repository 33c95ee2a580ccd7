"""Progress of long work: its output on a terminal, in a file, and after a restart."""

import sys
from io import StringIO

import pytest

from megatron_ext.common import progress as counting
from megatron_ext.common.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The clock that the progress reads."""
    now = [100.0]
    monkeypatch.setattr(counting.time, "monotonic", lambda: now[0])
    return now


def test_lines_every_few_seconds(clock, capsys):
    with Progress("recording", 1000, " samples", done=500) as progress:
        progress.add(50)
        assert capsys.readouterr().err == ""
        clock[0] += 10
        progress.add(50)
        progress.add(50)
    assert capsys.readouterr().err == "recording: 600 of 1,000 (60%), 10.0/s, 40 s left\n"


def test_what_an_earlier_run_did_says_nothing_of_the_speed(clock, capsys):
    progress = Progress("converting", 10_000_000, "B")
    progress.skip(4_000_000)
    clock[0] += 10
    progress.add(1_000_000, "layer 3")
    assert capsys.readouterr().err == "converting: 5.0 MB of 10.0 MB (50%), 0.1 MB/s, 50 s left, layer 3\n"


def test_text_is_told_in_documents_and_tokens(clock, capsys):
    progress = Progress("preprocessing", None, "B", log_interval=100)
    clock[0] += 10
    progress.add_text(1_000_000, 3_000_000, 99, 500)
    assert capsys.readouterr().err == ""
    progress.add_text(1_000_000, 3_000_000, 1, 500)
    said = "preprocessing: 2.0 MB, 0.2 MB/s, 100 documents, 0.6 MB/s of text, 100 tokens/s\n"
    assert capsys.readouterr().err == said


def test_quiet_is_quiet(clock, capsys):
    progress = Progress("weighing", 3, quiet=True)
    for _ in progress.over("abc"):
        clock[0] += 10
    progress.say("going on")
    assert progress.done == 3 and capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("recording", 10, " samples", done=5) as progress:
        progress.add(5)
    assert "recording: 100%" in terminal.getvalue() and "10.0/10.0" in terminal.getvalue()
