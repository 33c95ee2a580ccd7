"""Three gates of determinism on blended data, in the middle of epochs, with ramp-up and dropout.

A repeated run is the first; a resumed run is the uninterrupted one: losses, gradient norms, validation,
and every tensor of the final checkpoint, optimizer state included. (The third gate, a run against a
stored trace, is in test_golden.py and test_layouts.py.)
"""

import time

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from megatron_ext.checkpoint import checkpoint_dir, writer
from megatron_ext.checkpoint.safe import load_metadata
from tests.functional.test_run import BASE
from tests.helpers.faults import fused_run, steps_in
from tests.helpers.training import flags
from tests.unit.data import corpora

#: 20 samples in an epoch of the two datasets together; a run draws 80.
LENGTHS = [40, 90, 33, 60, 17, 80] * 2
RAMP = dict(train_iters=None, train_samples=80, rampup_batch_size=[4, 4, 24], global_batch_size=12)
RUNS = {
    "blend, ramp-up": (1, dict(micro_batch_size=2) | RAMP),
    "blend, distributed optimizer": (2, dict(use_distributed_optimizer=True, train_iters=10)),
    "blend, plain optimizer, async": (2, dict(async_save=True, train_iters=10)),
}


def run_with_late_copies(argv: list[str]) -> None:
    """Run the program with background saves whose copies start late, during the next iteration."""
    original = writer.snapshot

    def late(*args):
        time.sleep(0.2)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "snapshot", late)
        fused_run(argv, None)


@pytest.fixture
def run(pool, tmp_path, request):
    """A function that runs the program into a folder; returns its iterations."""
    prefixes = [corpora.make_dataset(tmp_path / name, LENGTHS, seed=i) for i, name in enumerate("ab")]
    processes, changes = request.param
    values = BASE | dict(
        mock_data=None, data_path=["0.7", prefixes[0], "0.3", prefixes[1]], split="80,20,0",
        data_cache_path=tmp_path / "cache", attention_dropout=0.1, hidden_dropout=0.1, eval_interval=2,
        save_interval=1,
    )  # fmt: skip

    def run_into(name: str, **more) -> list[dict]:
        metrics = tmp_path / f"{name}.jsonl"
        argv = flags(**values | changes | dict(save=tmp_path / name, metrics_file=metrics) | more)
        pool.run(processes, run_with_late_copies, argv, timeout=240)
        return steps_in(metrics)

    return run_into


def tensors(folder, iteration: int) -> dict[str, torch.Tensor]:
    """The sharded part of a checkpoint."""
    path = checkpoint_dir(folder, iteration)
    found = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in load_metadata(path).state_dict_metadata.items()
        if hasattr(value, "size")
    }
    load_tensors(found, storage_reader=FileSystemReader(path), no_dist=True)
    return found


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS, indirect=True)
def test_repeated_and_resumed_runs_are_the_first(run, tmp_path):
    whole, again = run("whole"), run("again", async_save=None)
    assert [step["lm_loss"] for step in again] == [step["lm_loss"] for step in whole]
    last = whole[-1]["iteration"]
    middle = last // 2
    resumed = run("resumed", load=tmp_path / "whole", ckpt_step=middle)
    compared = ("iteration", "lm_loss", "grad_norm", "learning_rate", "consumed_samples", "global_batch_size")
    assert len(resumed) == last - middle > 2
    for found, expected in zip(resumed, whole[middle:], strict=True):
        assert {name: found[name] for name in compared} == {name: expected[name] for name in compared}
    expected = tensors(tmp_path / "whole", last)
    assert any("exp_avg_sq" in key for key in expected)
    in_between = tensors(tmp_path / "whole", middle)  # by a save that training went on over, if it is async
    for name, iteration, of_whole in (
        ("again", middle, in_between), ("again", last, expected), ("resumed", last, expected),
    ):  # fmt: skip
        for key, value in tensors(tmp_path / name, iteration).items():
            assert torch.equal(value, of_whole[key]), (name, iteration, key)
