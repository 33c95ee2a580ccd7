"""An incomplete or altered checkpoint is detected and named, and its predecessor is used."""

import json
import logging
import shutil

import pytest

from megatron_ext.checkpoint import CheckpointError, checkpoint_dir, integrity, load_checkpoint
from megatron_ext.checkpoint.integrity import CHECKSUMS, damage, weights_sha256
from tests.helpers.parallel import Layout
from tests.unit.checkpoint.tiny import Run, arguments

FILES = (".metadata", "__0_0.distcp", "checksums.json", "common.pt", "metadata.json")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_whole(saved):
    folder = checkpoint_dir(saved, 2)
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(FILES)
    assert damage(folder) is None


@pytest.mark.parametrize(
    "harm", [cut, empty, flip, lambda path: path.unlink()], ids=["cut", "empty", "flip", "gone"]
)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen_and_names_the_file(saved, name, harm):
    harm(checkpoint_dir(saved, 2) / name)
    assert name in damage(checkpoint_dir(saved, 2))


def test_the_checksums_are_divided_among_ranks(saved):
    flip(checkpoint_dir(saved, 2) / "common.pt")
    found = [damage(checkpoint_dir(saved, 2), rank, 3) for rank in range(3)]
    assert len([problem for problem in found if problem]) == 1


@pytest.mark.parametrize("name", ["../common.pt", "/etc/passwd", "a/b"])
def test_checksums_cannot_name_files_elsewhere(saved, name):
    path = checkpoint_dir(saved, 2) / CHECKSUMS
    marker = json.loads(path.read_text())
    files = marker["files"] | {name: marker["files"]["common.pt"]}
    path.write_bytes(integrity.marker(2, files))
    assert "own folder" in damage(checkpoint_dir(saved, 2))


def test_previous_checkpoint_is_used(saved, caplog):
    flip(checkpoint_dir(saved, 2) / "__0_0.distcp")
    run = Run(arguments(Layout()))
    with caplog.at_level(logging.WARNING):
        assert load_checkpoint(saved, **run.parts).iteration == 1
    assert "iter_0000002 is damaged" in caplog.text and "__0_0.distcp was altered" in caplog.text


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(saved):
    for iteration in (1, 2):
        empty(checkpoint_dir(saved, iteration) / "common.pt")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_checkpoint(saved, **Run(arguments(Layout())).parts)


def test_an_iteration_that_is_asked_for_is_not_replaced_by_another(saved):
    run = Run(arguments(Layout()))
    assert load_checkpoint(saved, **run.parts, iteration=1).iteration == 1
    flip(checkpoint_dir(saved, 2) / "common.pt")
    with pytest.raises(CheckpointError, match="iter_0000002"):
        load_checkpoint(saved, **run.parts, iteration=2)
    with pytest.raises(CheckpointError, match=r"there is no .*iter_0000009; it has \[1, 2\]"):
        load_checkpoint(saved, **run.parts, iteration=9)


def test_the_tracker_decides_and_a_torn_one_does_not_lose_the_run(saved):
    run = Run(arguments(Layout()))
    tracker = saved / "latest_checkpointed_iteration.txt"
    tracker.write_text("1")
    assert load_checkpoint(saved, **run.parts).iteration == 1
    tracker.write_text("")
    assert load_checkpoint(saved, **run.parts).iteration == 2
    shutil.rmtree(checkpoint_dir(saved, 2))
    tracker.write_text("2")
    assert load_checkpoint(saved, **run.parts).iteration == 1


def test_nothing_there(single_process, tmp_path):
    run = Run(arguments(Layout()))
    assert load_checkpoint(tmp_path, **run.parts) is None
    assert load_checkpoint(tmp_path / "missing", **run.parts) is None


def test_weights_are_identified_by_themselves(saved, tmp_path):
    """Not by the arguments beside them, nor by their folder; with and without checksums."""
    folder = tmp_path / "copied"
    shutil.copytree(checkpoint_dir(saved, 2), folder)
    marked = weights_sha256(folder)
    assert marked == weights_sha256(checkpoint_dir(saved, 2))
    (folder / CHECKSUMS).unlink()
    pieces = weights_sha256(folder)
    flip(folder / "common.pt")
    assert weights_sha256(folder) == pieces
    flip(folder / "__0_0.distcp")
    assert weights_sha256(folder) != pieces
