"""How a run starts: from initial weights, from the given checkpoint, or not at all; and setting back."""

import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint import checkpoint_dir, clean_up, latest_iteration, list_iterations
from tests.functional.faults.test_kills import RUN
from tests.helpers.faults import Fuse, fused_run, killed, steps_in
from tests.helpers.pool import WorkerError
from tests.helpers.training import flags


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory) -> Path:
    """A folder with the checkpoints of iterations 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("start") / "run"
    pool.run(1, fused_run, argv(save=folder, exit_interval=6), None)
    return folder


@pytest.fixture
def own(saved, tmp_path) -> Path:
    """A copy of it, for a run that resumes there."""
    return shutil.copytree(saved, tmp_path / "run")


def argv(**changes) -> list[str]:
    return flags(**RUN | dict(save_interval=2, lr_decay_iters=10) | changes)


def refused(pool, processes: int, argv: list[str]) -> str:
    """The error of every rank for a refused start."""
    with pytest.raises(WorkerError) as failed:
        pool.run(processes, fused_run, argv, None, grace=20)
    text = str(failed.value)
    assert all(f"rank {rank} of {processes} failed" in text for rank in range(processes)), text
    return text


def content(folder: Path) -> dict[str, bytes]:
    """The files of all checkpoints."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("iter_*/*")}


def test_no_start_replaces_checkpoints_unasked(pool, own, tmp_path):
    """From initial weights, another folder's checkpoint, or only weights, all at an earlier iteration."""
    before = content(own)
    starts = [
        dict(save=own),
        dict(save=own, load=tmp_path / "empty"),
        dict(save=own, load=own, finetune=True),
        dict(save=own, load=tmp_path / "empty", pretrained_checkpoint=own),
    ]
    for start in starts:
        text = refused(pool, 2, argv(**start, use_distributed_optimizer=True))
        assert "it holds the checkpoints of [2, 4, 6], which this run, starting at iteration 0" in text
    other = shutil.copytree(own, tmp_path / "other")
    assert "the checkpoints of [6]" in refused(pool, 1, argv(save=own, load=other, ckpt_step=4))
    assert content(own) == before
    # Above them it may save; they are not of its run, so its retention leaves them alone.
    pool.run(1, fused_run, argv(save=own, load=other, exit_interval=8, keep_latest_k=1), None)
    assert latest_iteration(own) == 8 and before.items() <= content(own).items()


def test_what_is_there_and_cannot_be_used_is_an_error_of_every_rank(pool, own, tmp_path):
    (own / "latest_checkpointed_iteration.txt").write_text("1")
    text = refused(pool, 2, argv(load=own, save=own))
    assert "names iteration 1, which is not there; --ckpt-step takes one of those that are, [2, 4, 6]" in text
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for start in (
        dict(load=tmp_path / "hf"),
        dict(load=tmp_path / "empty", pretrained_checkpoint=tmp_path / "hf"),
        dict(load=tmp_path / "hf", record_sample_loss=tmp_path / "losses.npy"),
    ):
        assert "holds no checkpoint, but config.json; only an empty" in refused(
            pool, 1, argv(save_interval=None, **start)
        )


def test_a_first_start_that_was_killed_starts_again(pool, tmp_path):
    """Before its first save, with logs and metrics in the same folder, like a requeued job."""
    folder = tmp_path / "run"
    start = argv(
        save=folder, load=folder, train_iters=4, metrics_file=folder / "metrics.jsonl",
    )  # fmt: skip
    assert killed(pool, 1, start, Fuse(0, "a training step", 2)) is not None
    assert {"metrics.jsonl", ".lock"} <= {entry.name for entry in folder.iterdir()}
    pool.run(1, fused_run, start, None)
    assert latest_iteration(folder) == 4


def test_going_back_changes_nothing_until_something_is_saved(pool, own, tmp_path):
    """Killed before its first save and restarted without --ckpt-step, it resumes where it was."""
    before, metrics = content(own), tmp_path / "metrics.jsonl"
    back = argv(load=own, save=own, ckpt_step=2, metrics_file=metrics)
    assert killed(pool, 1, back, Fuse(0, "a training step", 2)) is not None
    clean_up(own)
    assert content(own) == before and latest_iteration(own) == 6
    metrics.unlink(missing_ok=True)
    pool.run(1, fused_run, argv(load=own, save=own, metrics_file=metrics), None)
    assert steps_in(metrics)[0]["iteration"] == 7


def test_going_back_removes_no_newer_checkpoint(pool, own):
    before = content(own)
    back = argv(load=own, save=own, ckpt_step=2, exit_interval=3, save_retain_interval=8)
    pool.run(1, fused_run, back, None)
    assert list_iterations(own) == [3, 4, 6] and latest_iteration(own) == 3
    after = content(own)
    assert all(after[name] == data for name, data in before.items() if "iter_0000002" not in name)


def test_what_a_run_went_back_behind_is_no_part_of_it(pool, own, tmp_path):
    """Set back to 2, it saves its own 3 and 5; 4 and 6 are not counted, not removed, and not used."""
    metrics = tmp_path / "metrics.jsonl"
    start = dict(load=own, save=own, keep_latest_k=2, metrics_file=metrics)
    pool.run(1, fused_run, argv(**start, ckpt_step=2, exit_interval=3), None)
    assert list_iterations(own) == [2, 3, 4, 6]
    pool.run(1, fused_run, argv(**start | dict(save_interval=5), exit_interval=5), None)
    assert list_iterations(own) == [3, 4, 5, 6] and latest_iteration(own) == 5
    assert [step["iteration"] for step in steps_in(metrics)] == [3, 4, 5]
    (checkpoint_dir(own, 5) / "__0_0.distcp").write_bytes(b"torn")
    metrics.unlink()
    pool.run(1, fused_run, argv(load=own, save_interval=None, exit_interval=5, metrics_file=metrics), None)
    assert [step["iteration"] for step in steps_in(metrics)] == [4, 5]
