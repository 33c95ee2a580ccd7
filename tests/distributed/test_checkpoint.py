"""Resuming is exact at the same layout and correct at another; a failure is raised on all ranks."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.checkpoint import (
    CheckpointError,
    checkpoint_dir,
    latest_iteration,
    load_checkpoint,
    save_checkpoint,
    writer,
)
from megatron_ext.checkpoint.content import unwrap
from megatron_ext.checkpoint.safe import load_metadata
from tests.helpers.parallel import Layout
from tests.helpers.pool import WorkerError
from tests.unit.checkpoint.tiny import RELATIVE, Run, arguments

DISTRIBUTED = "--use-distributed-optimizer"
MEM_EFFICIENT = "--distrib-optim-fully-reshardable-mem-efficient"
DROPOUT = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")
TIMEOUT = 300


def save_then_train(folder: str, layout: Layout, flags: tuple = (), async_save: bool = False) -> list[float]:
    """Train 2 iterations, save, train 2 more; the losses of all."""
    run = Run(arguments(layout, *flags)).train(2)
    pending = save_checkpoint(folder, 2, run_state=run.run_state, **run.parts, async_save=async_save)
    run.train(2)
    pending.finish()
    return run.losses


def resume(folder: str, layout: Layout, flags: tuple = ()) -> list[float]:
    """A new process that loads the checkpoint and trains 2 iterations; their losses."""
    run = Run(arguments(layout, *flags))
    loaded = load_checkpoint(folder, **run.parts)
    assert loaded.run_state == {"consumed_train_samples": 8, "round": 2} and loaded.optimizer_loaded
    run.iteration = loaded.iteration
    return run.train(2).losses


def resumed_bit_for_bit(folder: str, layout: Layout, flags: tuple, async_save: bool) -> None:
    """The resumed run equals the uninterrupted one: losses, gradient norms, every bit of the state."""
    run = Run(arguments(layout, *flags)).train(2)
    pending = save_checkpoint(folder, 2, run_state=run.run_state, **run.parts, async_save=async_save)
    run.train(2)
    pending.finish()

    torch.manual_seed(torch.distributed.get_rank())
    again = Run(arguments(layout, *flags))
    loaded = load_checkpoint(folder, **again.parts)
    assert loaded.rng_loaded
    again.iteration = loaded.iteration
    again.train(2)
    assert again.losses == run.losses[2:] and again.norms == run.norms[2:]
    assert again.bits() == run.bits()


@pytest.mark.parametrize(
    ("layout", "flags", "async_save"),
    [
        (Layout(tp=2, pp=2), DROPOUT, False),
        (Layout(dp=2), DROPOUT, True),
        (Layout(dp=2), (DISTRIBUTED, *DROPOUT), False),
        (Layout(dp=2), (DISTRIBUTED, "--save", "unused", "--save-interval", "1", MEM_EFFICIENT), False),
        (Layout(tp=2, dp=2), (DISTRIBUTED, "--sequence-parallel", "--bf16"), False),
        (Layout(dp=2), ("--bf16",), False),
    ],
    ids=str,
)
def test_same_layout_is_bit_identical(pool, tmp_path, layout, flags, async_save):
    pool.run(layout, resumed_bit_for_bit, str(tmp_path), layout, flags, async_save, timeout=TIMEOUT)


class SlowBuffers(dict):
    """Buffers that are slow to allocate: each copy starts late."""

    def get(self, *key):
        time.sleep(0.03)
        return super().get(*key)


def contents_of_saves(folder: str, layout: Layout, flags: tuple) -> tuple[bool, bool]:
    """Whether two saves of the same state hold the same: in the way, and while training goes on.

    First with the updates waiting for the copies, then with a run that does not wait.
    """
    run, same = Run(arguments(layout, *flags)).train(2), []
    for waits in (True, False):
        folders = [f"{folder}/{waits}-{name}" for name in ("sync", "async")]
        save_checkpoint(folders[0], 2, run_state=run.run_state, **run.parts)
        pending = save_checkpoint(
            folders[1], 2, run_state=run.run_state, **run.parts, async_save=True, wait_for_copies=False,
            buffers=SlowBuffers(),
        )  # fmt: skip
        run.train(2, pending.copied if waits else lambda: None)
        pending.finish()
        names = [sorted(path.name for path in checkpoint_dir(f, 2).iterdir()) for f in folders]
        assert names[0] == names[1]
        shards = [name for name in names[0] if name.endswith(".distcp")]
        sync, background = ([(checkpoint_dir(f, 2) / n).read_bytes() for n in shards] for f in folders)
        same.append(sync == background)
    return tuple(same)


@pytest.mark.parametrize("flags", [(), (DISTRIBUTED,), ("--bf16",)], ids=str)
def test_a_background_save_is_of_the_moment_it_was_asked_for(pool, tmp_path, flags):
    """Training goes on while tensors are copied; every file equals that of a synchronous save bit for bit."""
    layout = Layout(dp=2)
    found = pool.run(layout, contents_of_saves, str(tmp_path), layout, flags, timeout=TIMEOUT)
    assert [waiting for waiting, _ in found] == [True, True]
    if flags != (DISTRIBUTED,):  # whose state was gathered in copies already
        assert [careless for _, careless in found] == [False, False], "the copies were never in danger"


@pytest.fixture(scope="module", params=[(), (DISTRIBUTED,)], ids=["plain", "distributed"])
def saved(request, pool, tmp_path_factory) -> tuple[Path, list[float]]:
    """A checkpoint of 4 processes, plain or of the distributed optimizer, and the losses around it."""
    folder = tmp_path_factory.mktemp("saved")
    layout = Layout(tp=2, dp=2) if request.param else Layout(tp=2, pp=2)
    results = pool.run(layout, save_then_train, str(folder), layout, request.param, timeout=TIMEOUT)
    return folder, results[0]


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        (Layout(), ()),
        (Layout(tp=2), (DISTRIBUTED,)),
        (Layout(pp=2), (DISTRIBUTED,)),
        (Layout(dp=2), (DISTRIBUTED,)),
        (Layout(dp=2), ()),
    ],
    ids=str,
)
def test_another_layout_or_optimizer_continues_the_run(pool, saved, layout, flags):
    folder, losses = saved
    found = pool.run(layout, resume, str(folder), layout, flags, timeout=TIMEOUT)[0]
    assert found == pytest.approx(losses[2:], rel=RELATIVE)


def parameter_names(layout: Layout) -> list[str]:
    run = Run(arguments(layout))
    return [name for chunk in run.model for name, _ in unwrap(chunk).named_parameters()]


def test_every_parameter_and_its_moments_are_in_the_checkpoint(pool, saved):
    """A parameter that no sharded_state_dict mentions is silently omitted (MLP of core 0.16.1)."""
    keys = set(load_metadata(checkpoint_dir(saved[0], 2)).state_dict_metadata)
    renamed = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    for name in pool.run(Layout(), parameter_names, Layout(), timeout=TIMEOUT)[0]:
        parts = [part for part in name.split(".") if not part.isdigit()]
        key = ".".join(parts)
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs)
        for prefix in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
            assert prefix + key in keys


def fail_on_one_rank(folder: str, layout: Layout) -> list:
    """Save once, then again with a rank that may not write more than 1000 bytes to a file."""
    run = Run(arguments(layout))
    save_checkpoint(folder, 1, run_state=run.run_state, **run.parts)
    if torch.distributed.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large") as failure:
            save_checkpoint(folder, 2, run_state=run.run_state, **run.parts)
    finally:
        if torch.distributed.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.distributed.barrier()
    return [str(failure.value), latest_iteration(folder), sorted(os.listdir(folder))]


def test_a_rank_that_cannot_write_fails_the_save_everywhere(pool, tmp_path):
    for message, latest, left in pool.run(
        Layout(tp=2), fail_on_one_rank, str(tmp_path), Layout(tp=2), timeout=TIMEOUT
    ):
        assert "rank 1" in message or "File too large" in message
        assert latest == 1 and left == [".lock", "iter_0000001", "latest_checkpointed_iteration.txt"]


def die_in_the_middle(folder: str, layout: Layout, victim: int) -> None:
    """Save once, then again with a rank that is killed while it writes."""
    run = Run(arguments(layout))
    save_checkpoint(folder, 1, run_state=run.run_state, **run.parts)
    if torch.distributed.get_rank() == victim:
        writer.write_file = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        save_checkpoint(folder, 2, run_state=run.run_state, **run.parts)
    finally:
        Path(folder, f"waited_{torch.distributed.get_rank()}").write_text(str(time.monotonic() - started))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_saving_hangs_no_one(pool, tmp_path, victim):
    with pytest.raises(
        WorkerError, match=f"rank {victim} of 2 failed: the process died by SIGKILL"
    ) as failure:
        pool.run(Layout(tp=2), die_in_the_middle, str(tmp_path), Layout(tp=2), victim, timeout=TIMEOUT)
    assert "has gone or does not answer" in str(failure.value)
    assert float((tmp_path / f"waited_{1 - victim}").read_text()) < 30
    assert latest_iteration(tmp_path) == 1
    results = pool.run(Layout(tp=2), load_one, str(tmp_path), Layout(tp=2), timeout=TIMEOUT)
    assert results == [1, 1]


def load_one(folder: str, layout: Layout, *flags: str) -> int:
    return load_checkpoint(folder, **Run(arguments(layout, *flags)).parts).iteration


def damage_is_seen_by_all(folder: str) -> int:
    """Possibly only rank 0 checks the altered file; all ranks must fall back together."""
    return load_one(folder, Layout(dp=2))


def test_all_ranks_fall_back_together(pool, tmp_path):
    pool.run(Layout(dp=2), save_then_train, str(tmp_path), Layout(dp=2), timeout=TIMEOUT)
    shutil.copytree(checkpoint_dir(tmp_path, 2), checkpoint_dir(tmp_path, 3))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    common = checkpoint_dir(tmp_path, 3) / "common.pt"
    common.write_bytes(common.read_bytes()[::-1])
    assert pool.run(Layout(dp=2), damage_is_seen_by_all, str(tmp_path), timeout=TIMEOUT) == [2, 2]


def rng_of_every_rank(folder: str) -> bool:
    layout = Layout(dp=2)
    run = Run(arguments(layout))
    torch.manual_seed(77 + parallel_state.get_data_parallel_rank())
    save_checkpoint(folder, 1, run_state=run.run_state, **run.parts)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_checkpoint(folder, **run.parts)
    return torch.equal(torch.rand(3), expected)


def test_generators_of_every_data_parallel_rank_are_kept(pool, tmp_path):
    assert pool.run(Layout(dp=2), rng_of_every_rank, str(tmp_path), timeout=TIMEOUT) == [True, True]
