"""Initial weights are used only for an empty folder; any other content is used or named in an error."""

import hashlib
import logging
import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint import (
    CheckpointError,
    checkpoint_dir,
    load_checkpoint,
    read_checkpoint_args,
    save_checkpoint,
)
from megatron_ext.checkpoint.folders import TRACKER
from megatron_ext.checkpoint.found import find, outputs_of
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.open import open_source
from tests.helpers.parallel import Layout
from tests.unit.checkpoint.tiny import Run, arguments


def folder(base: Path, iterations: tuple, tracker: str | None = None, **files: str) -> Path:
    """Empty checkpoints, a tracker, and files; an underscore in their names is a dot."""
    base.mkdir()
    for iteration in iterations:
        checkpoint_dir(base, iteration).mkdir()
    for name, content in files.items():
        (base / name.replace("_", ".")).write_text(content)
    if tracker is not None:
        (base / TRACKER).write_text(tracker)
    return base


def tried(base: Path, **more) -> list[int]:
    return [iteration for _, iteration in find(base, **more).tries]


def test_absent_or_empty_is_nothing(tmp_path):
    assert tried(tmp_path / "absent") == tried(folder(tmp_path / "empty", ())) == []
    left = folder(tmp_path / "left", (), _lock="host", _next_tracker="5", progress_txt="", bad="")
    (left / "bad").rename(left / "events.out.tfevents.1.host")
    for name in (".incomplete_iter_0000005", ".removed_iter_0000005", "lost+found", "wandb"):
        (left / name).mkdir()
    assert tried(left) == []


def test_what_the_run_itself_writes_there_is_nothing(tmp_path):
    base = folder(tmp_path / "run", (), metrics_jsonl="{}", losses_json="{}")
    for name in ("tensorboard", "cache"):
        (base / name).mkdir()
    run = arguments(Layout())
    run.logging.metrics_file = str(base / "metrics.jsonl")
    run.logging.tensorboard_dir = str(base / "tensorboard" / "mine")
    run.data.data_cache_path, run.rounds.record_sample_loss = str(base / "cache"), str(base / "losses.npy")
    assert tried(base, outputs=outputs_of(run)) == []
    with pytest.raises(CheckpointError, match="cache, losses.json, metrics.jsonl, tensorboard"):
        find(base)
    (base / "other").touch()
    with pytest.raises(CheckpointError, match="holds no checkpoint, but other;"):
        find(base, outputs=outputs_of(run))


@pytest.mark.parametrize(
    ("iterations", "tracker", "expected"),
    [
        ((5, 10), "10", [10, 5]),
        ((5, 10, 20), "10\n", [10, 5]),  # set back by hand, or by a run that went back
        ((5, 10), "12", [10, 5]),  # the newest was removed
        ((5, 10), None, [10, 5]),
        *(((5, 10), torn, [10, 5]) for torn in ("", "-5", "１０", "9" * 5000, "x", "\x00")),
    ],
)
def test_the_tracker_decides_and_without_one_the_newest(tmp_path, iterations, tracker, expected):
    base = folder(tmp_path / "run", iterations, tracker)
    assert tried(base) == expected
    assert bool(find(base).notes) == (tracker != "10")


@pytest.mark.parametrize(
    ("iterations", "tracker", "says"),
    [
        ((10, 15), "1", r"iteration 1, which is not there; --ckpt-step takes .* \[10, 15\]"),
        ((4, 20), "10", "iteration 10, which is not there; --ckpt-step"),
        ((4,), "release", "names release, which is not there; --ckpt-step"),
        *(((), tracker, "nor is there any checkpoint") for tracker in ("4", "release", "", "-1", "１２")),
    ],
)
def test_a_tracker_that_cannot_be_followed_is_an_error(tmp_path, iterations, tracker, says):
    base = folder(tmp_path / "run", iterations, tracker)
    with pytest.raises(CheckpointError, match=says):
        find(base)


def test_release_is_taken_where_the_tracker_names_it_or_it_is_alone(tmp_path):
    base = folder(tmp_path / "run", (), "release")
    (base / "release").mkdir()
    assert find(base).tries == [(base / "release", 0)]
    (base / TRACKER).unlink()
    assert find(base).tries == [(base / "release", 0)]
    checkpoint_dir(base, 3).mkdir()
    assert tried(base) == [3]  # a run that began from it


def test_something_else_is_an_error_that_names_it(tmp_path):
    hugging_face = folder(tmp_path / "hf", (), config_json="{}", model_safetensors="")
    with pytest.raises(CheckpointError, match="but config.json, model.safetensors; .*convert_checkpoint"):
        find(hugging_face)
    with pytest.raises(CheckpointError, match="holds no checkpoint, but a.bin, a.idx"):
        find(folder(tmp_path / "data", (), a_bin="", a_idx=""))
    foreign = folder(tmp_path / "foreign", ())
    for name in ("checkpoint-500", "iter_10", "iter_00000010"):
        (foreign / name).mkdir()
    checkpoint_dir(foreign, 7).symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="checkpoint-500, iter_00000010, iter_0000007, iter_10"):
        find(foreign)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, says in (("file", "is a file, not a folder"), ("link", "is a link that leads nowhere")):
        with pytest.raises(CheckpointError, match=says):
            find(tmp_path / name)
    with pytest.raises(CheckpointError, match="is one checkpoint, not the folder"):
        find(folder(tmp_path / "one", (), common_pt=""))


def test_an_iteration_that_is_not_there_is_an_error_also_in_an_empty_folder(tmp_path):
    for base in (tmp_path / "absent", folder(tmp_path / "empty", ())):
        with pytest.raises(CheckpointError, match=r"there is no .*iter_0000005; it has \[\]"):
            find(base, 5)


def test_one_that_a_killed_save_had_moved_aside_is_found(tmp_path):
    base = folder(tmp_path / "run", (10, 20), "20")
    aside = base / ".replaced_iter_0000020"
    checkpoint_dir(base, 20).rename(aside)
    assert find(base).tries == [(aside, 20), (checkpoint_dir(base, 10), 10)]


def test_training_and_tools_agree(saved):
    """Reading arguments, loading and converting all find the same checkpoint, or raise the same error."""
    run = Run(arguments(Layout()))
    (saved / TRACKER).write_text("0")
    for read in (lambda: load_checkpoint(saved, **run.parts), lambda: open_source(saved)):
        with pytest.raises(
            (CheckpointError, InterchangeError), match="names iteration 0, which is not there"
        ):
            read()
    (saved / TRACKER).write_text("")
    assert load_checkpoint(saved, **run.parts).iteration == open_source(saved).iteration == 2


def test_arguments_of_a_damaged_checkpoint_are_those_of_the_one_before(saved):
    (checkpoint_dir(saved, 2) / "common.pt").write_bytes(b"torn")
    assert read_checkpoint_args(saved)["iteration"] == 1
    with pytest.raises(CheckpointError, match="iter_0000002"):
        read_checkpoint_args(saved, 2)
    assert read_checkpoint_args(saved / "absent") is None


def tree(base: Path) -> dict[str, str]:
    """Everything below a folder, and its content."""
    return {
        str(path.relative_to(base)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in base.rglob("*")
    }


def test_loading_changes_nothing_even_of_a_save_that_was_cut_off(saved):
    """The folder may belong to a running job that saves there."""
    for name in (".incomplete_iter_0000003", ".removed_iter_0000001", ".incomplete_hf"):
        shutil.copytree(checkpoint_dir(saved, 2), saved / name)
    checkpoint_dir(saved, 2).rename(saved / ".replaced_iter_0000002")
    (saved / ".next_tracker").write_text("3")
    before = tree(saved)
    run = Run(arguments(Layout(), "--load", str(saved), "--save", str(saved), "--save-interval", "1"))
    assert load_checkpoint(saved, **run.parts).iteration == 2
    assert tree(saved) == before


def test_a_run_falls_back_to_its_own_checkpoints_not_to_those_it_left_behind(saved_once, tmp_path, caplog):
    """1, 2, 5 are saved; the run is set back to 1 and saves 3 and 6, of which 6 is damaged."""
    run = Run(arguments(Layout()))
    load_checkpoint(saved_once, **run.parts)

    def save(iteration: int, **state) -> None:
        save_checkpoint(tmp_path, iteration, run_state=state, **run.parts)

    for iteration in (1, 2, 5):
        save(iteration)
    save(3, checkpoints=[1])
    save(6, checkpoints=[1, 3, 4])
    assert find(tmp_path).before == [1, 3]
    (checkpoint_dir(tmp_path, 6) / "__0_0.distcp").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        loaded = load_checkpoint(tmp_path, **run.parts)
    assert loaded.path.name == "iter_0000003" and loaded.checkpoints == [1, 3]
    assert load_checkpoint(tmp_path, **run.parts, iteration=5).checkpoints == [1, 2, 5]
    run.config.checkpoint.keep_latest_k = 1
    save(7, checkpoints=[1, 3, 6])
    assert [int(place.name[5:]) for place in sorted(tmp_path.glob("iter_*"))] == [2, 5, 7]
