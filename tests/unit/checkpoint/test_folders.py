"""Publishing, finding and removing a checkpoint are atomic, whenever the process is killed."""

import contextlib
import errno
import shutil

import pytest

from megatron_ext.checkpoint import (
    Retain,
    checkpoint_dir,
    clean_up,
    folders,
    latest_iteration,
    list_iterations,
)


class Killed(BaseException):
    """Simulates kill -9: our code must not catch it or clean up after it."""


def save(base, iteration, content="x"):
    folders.prepare(base, iteration)
    (folders.working_dir(base, iteration) / "data").write_text(content)
    folders.publish(base, iteration)


def kill_at(monkeypatch, call: int) -> list:
    """Suppress the ``call``-th change to the disk and all later ones."""
    calls = []

    def counted(original):
        def change(*args, **kwargs):
            calls.append(original.__name__)
            if len(calls) >= call:
                raise Killed
            return original(*args, **kwargs)

        return change

    monkeypatch.setattr(folders, "write_durably", counted(folders.write_durably))
    monkeypatch.setattr(folders, "fsync_dir", counted(folders.fsync_dir))
    monkeypatch.setattr(folders.Path, "rename", counted(folders.Path.rename))
    monkeypatch.setattr(folders.Path, "replace", counted(folders.Path.replace))
    monkeypatch.setattr(folders.shutil, "rmtree", counted(folders.shutil.rmtree))
    return calls


@pytest.mark.parametrize("again", [False, True], ids=["new", "same iteration again"])
def test_killed_at_any_change_of_the_disk(tmp_path, again):
    target = 1 if again else 2
    call, finished = 0, False
    while not finished:
        call += 1
        base = tmp_path / str(call)
        save(base, 1, "old")
        with pytest.MonkeyPatch.context() as patch:
            calls = kill_at(patch, call)
            try:
                save(base, target, "new")
                finished = True
            except Killed:
                pass
        clean_up(base)
        iteration = latest_iteration(base)
        assert iteration in (1, target)
        content = (checkpoint_dir(base, iteration) / "data").read_text()
        assert content in ("old", "new") and (again or content == ("old" if iteration == 1 else "new"))
        left = {entry.name for entry in base.iterdir()}
        assert left <= {folders.TRACKER, "iter_0000001", "iter_0000002"}, left
        save(base, 3)
        assert latest_iteration(base) == 3
    assert len(calls) >= 6


def test_killed_while_a_run_that_went_back_replaces_a_checkpoint(tmp_path):
    """Killed anywhere, also during clean-up: the tracker names 20 if 20 is the new one, otherwise 15."""
    call, finished = 0, False
    while not finished:
        call += 1
        base = tmp_path / str(call)
        for iteration, content in ((10, "old"), (20, "old"), (15, "new")):
            save(base, iteration, content)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, call)
            try:
                save(base, 20, "new")
                finished = True
            except Killed:
                pass
        for cleaning in range(4):
            copy = shutil.copytree(base, base.with_name(f"{call}-{cleaning}"))
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
                kill_at(patch, cleaning)
                if cleaning:
                    clean_up(copy)
            for _ in ("as a reader finds it", "as the next run does"):
                place = folders.stored(copy)
                latest = latest_iteration(copy)
                assert (place[latest] / "data").read_text() == "new"
                assert latest == 20 or (latest == 15 and (place[20] / "data").read_text() == "old")
                clean_up(copy)


def test_a_full_disk_leaves_the_checkpoint_that_was_to_be_replaced(tmp_path, monkeypatch):
    save(tmp_path, 1, "old")

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders, "write_durably", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 1, "new")
    assert (checkpoint_dir(tmp_path, 1) / "data").read_text() == "old"


def test_cleaning_up_touches_what_saves_left_and_nothing_else(tmp_path):
    """Neither files of others next to the checkpoints, nor the targets of links."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").write_text("kept")
    base = tmp_path / "run"
    save(base, 5)
    others = [
        ".incomplete_hf",
        ".removed_by_me",
        ".incomplete_iter_5",
        ".replaced_iter_0000005.old",
        "iter_7",
    ]
    for name in others:
        (base / name).mkdir()
    for name in (".incomplete_iter_0000006", ".removed_iter_0000004", ".replaced_iter_0000005"):
        (base / name).mkdir()
    for name in (".incomplete_iter_0000008", ".removed_iter_0000009"):
        (base / name).symlink_to(elsewhere)
    clean_up(base)
    assert {entry.name for entry in base.iterdir()} == {*others, "iter_0000005", folders.TRACKER}
    assert (elsewhere / "data").read_text() == "kept"


def test_a_linked_checkpoint_is_not_removed_and_ends_no_start(tmp_path):
    """A checkpoint that was moved to another disk and replaced by a link."""
    base, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save(base, 10, "moved")
    checkpoint_dir(base, 10).rename(elsewhere)
    checkpoint_dir(base, 10).symlink_to(elsewhere)
    save(base, 20)
    folders.remove(base, 10)
    assert list_iterations(base) == [10, 20]
    save(base, 10, "new")
    save(base, 30)
    assert list_iterations(base) == [10, 20, 30] and not checkpoint_dir(base, 10).is_symlink()
    assert (elsewhere / "data").read_text() == "moved"


def test_reading_needs_no_clean_up(tmp_path):
    save(tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders.Path, "replace", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            save(tmp_path, 2)
    assert (tmp_path / folders.TRACKER).read_text() == "1"
    assert latest_iteration(tmp_path) == 2


@pytest.mark.parametrize(
    "content", ["", "release", "12x", "\x00\xff", "-5", "１２", "1 2", "9" * 5000, "\ufeff12"]
)
def test_tracker_that_names_no_iteration(tmp_path, content):
    (tmp_path / folders.TRACKER).write_text(content)
    assert latest_iteration(tmp_path) is None


def test_names_are_megatrons():
    assert checkpoint_dir("run", 100).as_posix() == "run/iter_0000100"
    assert checkpoint_dir("run", 12345678).as_posix() == "run/iter_12345678"


@pytest.mark.parametrize(
    ("retain", "removed"),
    [
        (Retain(), []),
        (Retain(interval=20), [30]),
        (Retain(interval=30), []),
        (Retain(latest=2), [10, 20]),
        (Retain(latest=2, interval=20), [10]),
        (Retain(latest=0), [10, 20, 30]),
    ],
)
def test_retention(retain, removed):
    assert retain.superseded([10, 20, 30], newest=40) == removed


def test_neither_the_newest_nor_a_later_one_is_removed():
    for latest in (None, 0, 1, 2, 3):
        assert Retain(latest=latest, interval=2).superseded([5, 7, 9], newest=5) == []
