"""Only one run at a time saves into a folder, however the previous one ended."""

import errno
import fcntl
import gc
import os
import signal
import socket
import time

import pytest

from megatron_ext.checkpoint import CheckpointError, lock, only_run_in
from tests.functional.test_run import BASE
from tests.helpers.pool import WorkerError
from tests.helpers.training import _pretrain, flags


@pytest.fixture
def holder(tmp_path):
    """The id of a process that holds the lock on ``tmp_path`` and has a child that outlives it."""
    reads, writes = os.pipe()
    gc.disable()  # in a fork the collector would end what threads hold that are not there
    pid = os.fork()
    if pid == 0:
        os.setsid()
        held = lock.saving_into(tmp_path, 0)
        held.__enter__()
        if os.fork():
            os.write(writes, b"held")
        time.sleep(60)
        os._exit(0)
    gc.enable()
    assert os.read(reads, 4) == b"held"
    yield pid
    os.killpg(pid, signal.SIGKILL)
    os.close(reads), os.close(writes)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_folder_in_use_is_refused_until_its_process_is_killed(tmp_path, holder):
    with pytest.raises(CheckpointError, match=rf"host {socket.gethostname()}, process {holder}\);"):
        with lock.saving_into(tmp_path, 0.3):
            pass
    kill(holder)
    with lock.saving_into(tmp_path, 0):
        pass


def test_a_lock_taken_twice_in_one_process_is_held_until_it_is_given_back_twice(tmp_path):
    """A save uses the lock that its run holds; POSIX would release it at the first close."""

    def refused() -> bool:
        pid = os.fork()
        if pid == 0:
            lock._held.clear()
            try:
                with lock.saving_into(tmp_path, 0):
                    os._exit(0)
            except CheckpointError:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1

    with lock.saving_into(tmp_path, 0):
        with lock.saving_into(tmp_path, 0):
            assert refused()
        assert refused()
    assert not refused()


def test_a_run_that_is_just_ending_is_waited_for(tmp_path, holder):
    killer = os.fork()
    if killer == 0:
        time.sleep(0.5)
        os.kill(holder, signal.SIGKILL)
        os._exit(0)
    with lock.saving_into(tmp_path, 30):
        pass
    os.waitpid(killer, 0)
    os.waitpid(holder, 0)


def impatient_run(argv: list[str]) -> None:
    from megatron_ext import checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "only_run_in", lambda folder: only_run_in(folder, wait=0.1))
        _pretrain(argv)


def test_every_rank_of_the_second_run_says_whose_the_folder_is(pool, tmp_path, holder):
    argv = flags(**BASE | dict(save=tmp_path, save_interval=1, train_iters=1))
    with pytest.raises(WorkerError) as failed:
        pool.run(2, impatient_run, argv, grace=20)
    said = f"could not take --save {tmp_path} for this run: another run saves into it (host "
    assert str(failed.value).count(said) >= 2 and f"process {holder})" in str(failed.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [lock.LOCK]
    kill(holder)
    pool.run(2, impatient_run, argv)
    assert (tmp_path / "iter_0000001").is_dir()


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock.saving_into(tmp_path, 0):
        assert f"no lock on {tmp_path} (No locks available)" in capsys.readouterr().err
