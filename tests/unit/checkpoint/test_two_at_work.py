"""Two runs in one folder: the second is refused without damage; leftovers of a dead run are cleaned up."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_ext.checkpoint import (
    CheckpointError,
    checkpoint_dir,
    clean_up,
    folders,
    load_checkpoint,
    lock,
    only_recording_in,
    save_checkpoint,
)
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.export import export_folder
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.target import write_checkpoint
from tests.helpers.parallel import Layout
from tests.unit.checkpoint.tiny import Run, arguments


@contextmanager
def another(work: Callable[[Callable[[], None]], None]) -> Iterator[Callable[[], None]]:
    """A process that runs ``work`` and stops where it calls its argument; yields a function to kill it."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work(lambda: (os.write(writes, b"there"), time.sleep(600)))
        finally:
            os._exit(1)
    os.close(writes)
    assert os.read(reads, 5) == b"there"

    alive = [pid]

    def kill() -> None:
        while alive:
            os.kill(alive[0], signal.SIGKILL)
            os.waitpid(alive.pop(), 0)

    try:
        yield kill
    finally:
        kill()
        os.close(reads)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_two_exports_to_one_folder_beside_a_run(saved):
    source = open_source(saved)

    def stuck(stay: Callable[[], None]) -> None:
        export_folder(saved / "hf", source.model, source.dtype, lambda name: stay(), tokenizer=None)

    with another(stuck) as kill:
        begun = names(saved / ".incomplete_hf")
        clean_up(saved)  # as the run does, whose folder it is
        with pytest.raises(InterchangeError, match=r"another process writes it \(host .*, process \d+\)"):
            export_folder(saved / "hf", source.model, source.dtype, source.get)
        assert names(saved / ".incomplete_hf") == begun
        kill()
        export_folder(saved / "hf", source.model, source.dtype, source.get)
    assert not {name for name in names(saved) if "hf" in name} - {"hf"}
    assert open_source(saved / "hf").kind == "hf"


def test_a_conversion_into_the_folder_of_a_run_that_has_not_saved_yet(saved, tmp_path):
    """The run's first save is being written: neither it nor the folder may be removed."""
    source, base = open_source(saved), tmp_path / "run"

    def first_save(stay: Callable[[], None]) -> None:
        with lock.saving_into(base):
            (folders.prepare(base, 5) / "data").write_text("half")
            stay()

    with another(first_save) as kill:
        with pytest.raises(InterchangeError, match="another run saves into it"):
            write_checkpoint(base, source.model, source.dtype, source.get)
        assert (folders.working_dir(base, 5) / "data").read_text() == "half"
        kill()
        write_checkpoint(base, source.model, source.dtype, source.get)
    assert names(base) == {"iter_0000000", folders.TRACKER, lock.LOCK}


def test_a_save_from_python_into_the_folder_of_a_run(saved, monkeypatch):
    run = Run(arguments(Layout()))
    load_checkpoint(saved, **run.parts)
    monkeypatch.setattr(lock.saving_into, "__defaults__", (0.1,))

    def saves(stay: Callable[[], None]) -> None:
        with lock.saving_into(saved):
            folders.prepare(saved, 3)
            stay()

    with another(saves) as kill:
        with pytest.raises(CheckpointError, match="another run saves into it"):
            save_checkpoint(saved, 3, run_state={}, **run.parts)
        assert folders.working_dir(saved, 3).is_dir() and not checkpoint_dir(saved, 3).exists()
        kill()
        save_checkpoint(saved, 3, run_state={}, **run.parts)
    assert checkpoint_dir(saved, 3).is_dir() and not folders.working_dir(saved, 3).exists()


def test_two_recordings_into_one_file(single_process, tmp_path):
    def records(stay: Callable[[], None]) -> None:
        with lock.locked(tmp_path / ".losses.lock", "another run records into it"):
            stay()

    with another(records) as kill:
        for spelling in ("losses", "losses.npy"):
            with (
                pytest.raises(CheckpointError, match=r"take --record-sample-loss .*records into it \(host"),
                only_recording_in(tmp_path / spelling),
            ):
                pass
        kill()
        with only_recording_in(tmp_path / "losses.npy"):
            assert names(tmp_path) == {".losses.lock"}
    assert names(tmp_path) == set()


def test_a_lock_file_that_its_holder_removes_while_one_waits(tmp_path):
    """The waiting process must not end up with a lock on a file that was removed."""
    path = tmp_path / "lock"

    def holds(stay: Callable[[], None]) -> None:
        with lock.locked(path, "taken"):
            stay()

    with another(holds) as kill:
        waiting = os.fork()
        if waiting == 0:
            with lock.locked(path, "taken", wait=30):
                os._exit(0 if path.exists() else 3)
        time.sleep(0.5)
        path.unlink()
        kill()
        assert os.waitstatus_to_exitcode(os.waitpid(waiting, 0)[1]) == 0
