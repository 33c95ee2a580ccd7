"""Side outputs of training: a failure is reported once, does not end the run, and is retried."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from megatron_ext.config.output import LoggingConfig
from megatron_ext.training import side
from megatron_ext.training.metric_writers import MetricWriters
from megatron_ext.training.side import LinesFile, Side


@pytest.fixture
def at_once(monkeypatch):
    """Retry failed outputs at the next call."""
    monkeypatch.setattr(side, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(side, "MAX_RETRY_SECONDS", 0.0)


def fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failure_is_said_once_and_so_is_its_end(at_once, capsys):
    output = Side("--output here")
    assert [output.attempt(action) for action in (fail, fail, list, list, fail)] == [0, 0, 1, 1, 0]
    trouble = "WARNING: --output here: [Errno 28] No space left on device: training goes on without it\n"
    assert capsys.readouterr().err == f"{trouble}--output here works again\n{trouble}"


def test_what_failed_is_left_alone_for_a_while(capsys):
    output, tried = Side("--output"), []
    output.attempt(fail)
    assert not output.attempt(lambda: tried.append(1)) and not tried
    assert output.attempt(lambda: tried.append(1), now=True) and tried


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of two pages: when it is full, a line is written only in part."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_tears_no_line_and_loses_none(tiny_disk, at_once, capsys):
    path, lines = (
        tiny_disk / "metrics.jsonl",
        [json.dumps({"iteration": n, "x": "y" * 900}) for n in range(20)],
    )
    (tiny_disk / "other").write_bytes(b"x" * 4096)
    file = LinesFile(path, "--metrics-file")
    for line in lines[:15]:
        file.write(line)
        assert path.read_text().splitlines() == lines[: min(len(path.read_text().splitlines()), 15)]
    assert path.read_text().endswith("}\n") and len(path.read_text()) < 4096
    assert capsys.readouterr().err.count("No space left on device") == 1
    (tiny_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=64k", str(tiny_disk)], check=True)
    for line in lines[15:]:
        file.write(line)
    file.close()
    assert path.read_text().splitlines() == lines


def test_a_file_that_was_removed_with_its_folder_is_made_again(tmp_path):
    file = LinesFile(tmp_path / "logs" / "metrics.jsonl", "--metrics-file")
    file.write("1")
    shutil.rmtree(tmp_path / "logs")
    file.write("2")
    file.close()
    assert (tmp_path / "logs" / "metrics.jsonl").read_text() == "2\n"


@pytest.mark.parametrize(
    ("left", "stays"),
    [
        ('{"iteration": 1}\n{"itera', '{"iteration": 1}\n'),
        ('{"iteration": 1}\n{"iteration": 2}', '{"iteration": 1}\n{"iteration": 2}\n'),
        ("a line of another program", "a line of another program\n"),
        ('{"itera', ""),
        ('{"samples": [{"number": 1}', ""),
    ],
)
def test_half_a_record_of_a_killed_run_is_cut_off(tmp_path, left, stays):
    path = tmp_path / "metrics.jsonl"
    path.write_text(left)
    file = LinesFile(path, "--metrics-file")
    for line in ("2", "3"):
        file.write(line)
    file.close()
    assert path.read_text() == stays + "2\n3\n"


def test_a_device_that_takes_nothing(capsys):
    file = LinesFile("/dev/full", "--metrics-file")
    for number in range(3):
        file.write(str(number))
    file.close()
    assert capsys.readouterr().err.count("WARNING") == 1


def test_a_board_whose_folder_is_removed_is_made_again(tmp_path, at_once, capsys):
    folder = tmp_path / "board"
    config = LoggingConfig(tensorboard_queue_size=10, tensorboard_dir=str(folder))
    boards = MetricWriters(config, {"save": None})
    boards.scalar("lm loss", 1.0, 1, 10)
    boards.boards[0][1].writer.flush()
    shutil.rmtree(folder)
    for iteration in range(2, 60):
        boards.scalar("lm loss", 1.0, iteration, 10 * iteration)
        if boards.boards[0][1].writer is not None:
            boards.boards[0][1].writer.file_writer.event_writer._async_writer._byte_queue.join()
    boards.close()
    said = capsys.readouterr().err
    assert said.count("WARNING: --tensorboard-dir") == 1 and "works again" in said
    assert "Traceback" not in said and "Exception in thread" not in said
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert len(events.Scalars("lm loss")) > 10 and events.Scalars("lm loss")[-1].step == 59


PRINTS = """
import sys
from megatron_ext.training.side import steady_streams
with steady_streams():
    for n in range(10_000):
        print("line", n, flush=n % 100 == 0)
    print("some error", file=sys.stderr)
"""


def printed(setting: str, unbuffered: str = "") -> subprocess.CompletedProcess:
    """Run a program that prints a lot, with streams set up by a shell."""
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {setting}', sys.executable, PRINTS]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (">/dev/full", "standard output: [Errno 28] No space left on device"),
        ("| head -n 1", "standard output: [Errno 32] Broken pipe"),
        ("2>/dev/full", "standard error: [Errno 28] No space left on device"),
        ("2>&1 >/dev/full | cat >&2", "standard output: [Errno 28] No space left on device"),
    ],
)
def test_a_stream_that_fails_is_told_of_on_the_other_and_ends_nothing(setting, said, unbuffered):
    done = printed(setting, unbuffered)
    assert done.returncode == 0
    text = done.stdout + done.stderr
    assert text.count("WARNING") == 1 and said in text and "Traceback" not in text


@pytest.mark.parametrize("setting", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full 2>/dev/full"])
def test_streams_that_are_closed_end_nothing(setting):
    assert printed(setting).returncode == 0
