"""Full disks and closed pipes for all side outputs of a run: training goes on, and saves."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.functional.test_run import BASE
from tests.helpers.faults import newest_whole
from tests.helpers.training import _pretrain, flags

PROGRAM = str(REPOSITORY / "pretrain_pangu_pro.py")


@pytest.fixture
def full_disk(tmp_path):
    """A file system without free space."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    (place / "data").write_bytes(b"x" * 16384)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("broken", ["standard output", "standard error"])
def test_nothing_beside_training_ends_it(tmp_path, full_disk, broken):
    save = tmp_path / "save"
    save.mkdir()
    (save / "progress.txt").symlink_to("/dev/full")
    argv = flags(
        **BASE | dict(train_iters=40, log_interval=1, save=save, save_interval=30, log_progress=True),
        profile=True, profile_step_start=1, profile_step_end=2, metrics_file=full_disk / "metrics.jsonl",
        tensorboard_dir=full_disk / "board", tensorboard_queue_size=5, timing_log_level=1,
        log_timers_to_tensorboard=True,
    )  # fmt: skip
    with open("/dev/full", "w") as full, open(tmp_path / "log", "w") as log:
        streams = (full, log) if broken == "standard output" else (log, full)
        command = [sys.executable, "-W", "ignore", PROGRAM, *argv]
        done = subprocess.run(command, stdout=streams[0], stderr=streams[1], cwd=REPOSITORY, timeout=120)
    text = (tmp_path / "log").read_text()
    assert done.returncode == 0, text
    assert newest_whole(save) == 40
    for name in (broken, "--metrics-file", "--tensorboard-dir", "--log-progress", "--profile"):
        assert text.count(f"WARNING: {name}") == 1, text
    assert "Traceback" not in text and "Exception" not in text


def times_of_a_pipeline(argv: list[str], log: str) -> None:
    """Standard output to a file of the rank."""
    import contextlib

    import torch

    with open(f"{log}{torch.distributed.get_rank()}", "w") as file, contextlib.redirect_stdout(file):
        _pretrain(argv)


def test_times_of_all_ranks_are_reported(pool, tmp_path):
    """A collective call, although the stages of a pipeline have other timers and one rank has a board."""
    argv = flags(
        **BASE | dict(pipeline_model_parallel_size=2, log_interval=2, timing_log_level=2, eval_iters=0),
        tensorboard_dir=tmp_path / "board", log_timers_to_tensorboard=True,
    )  # fmt: skip
    pool.run(2, times_of_a_pipeline, argv, str(tmp_path / "log"), timeout=120)
    text = (tmp_path / "log1").read_text()
    assert text.count("(min, max) time across ranks (ms):") == 3 and "forward-backward" in text
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"forward-backward-time", "backward-send-time", "backward-recv-time"} <= tags
