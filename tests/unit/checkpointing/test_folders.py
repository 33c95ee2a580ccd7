"""A checkpoint appears, is found and disappears all or nothing, whenever the process is killed."""

import pytest

from megatron_ext.training.checkpointing import Retain, checkpoint_dir, clean_up, folders, latest_iteration


class Killed(BaseException):
    """Stands for a kill -9: nothing of ours may catch it or clean up after it."""


def save(base, iteration, content="x"):
    folders.prepare(base, iteration)
    (folders.working_dir(base, iteration) / "data").write_text(content)
    folders.publish(base, iteration)


def kill_at(monkeypatch, call: int) -> list:
    """Let the ``call``-th change of the disk below not happen, nor any after it."""
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


def test_reading_needs_no_clean_up(tmp_path):
    save(tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders.Path, "replace", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            save(tmp_path, 2)
    assert (tmp_path / folders.TRACKER).read_text() == "1"
    assert latest_iteration(tmp_path) == 2


@pytest.mark.parametrize("content", ["", "release", "12x", "\x00\xff"])
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
    assert retain.superseded([10, 20, 30, 40], newest=40, previous=30) == removed


def test_newest_is_never_removed():
    for latest in range(4):
        assert 5 not in Retain(latest=latest, interval=2).superseded([5, 7, 9], newest=5, previous=7)
