"""NaN and Inf: reported with rank, iteration, microbatch and samples, and skipped up to a limit."""

import json

import pytest
import torch

from megatron_ext.training import bad_numbers, batch, setup
from tests.functional.test_run import BASE, run
from tests.helpers.pool import WorkerError
from tests.helpers.training import _pretrain, flags, losses

#: Microbatches a rank reads in an iteration of BASE on two data parallel ranks.
PER_STEP = BASE["global_batch_size"] // BASE["micro_batch_size"] // 2


def nan_in_microbatch(argv: list[str], rank: int, iterations: list[int], microbatch: int) -> None:
    """Run with a NaN in the loss mask of one microbatch of each of these iterations on one rank."""
    numbers = iter(range(10**6))
    bad = {(iteration - 1) * PER_STEP + microbatch for iteration in iterations}
    original = batch.next_batch

    def poisoned(iterator):
        found = original(iterator)
        if torch.distributed.get_rank() == rank and next(numbers) in bad:
            found.loss_mask[0, 3] = float("nan")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "next_batch", poisoned)
        _pretrain(argv)


def nan_in_a_gradient(argv: list[str], rank: int) -> None:
    """Run with an Inf in the gradient of one parameter on one rank."""
    original = setup.build_trainer

    def poisoned(args):
        trainer = original(args)
        name, parameter = list(bad_numbers.unwrap(trainer.model[0]).named_parameters())[4]
        if torch.distributed.get_rank() == rank:
            parameter.register_hook(lambda gradient: gradient / 0)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "build_trainer", poisoned)
        _pretrain(argv)


def test_a_bad_loss_is_named_with_its_samples(pool, tmp_path):
    argv = flags(**BASE | dict(save=tmp_path, save_interval=100))
    with pytest.raises(WorkerError) as failed:
        pool.run(2, nan_in_microbatch, argv, 1, [3], 1)
    text = str(failed.value)
    # Iteration 3 begins at sample 16; rank 1 reads the second of each pair of microbatches of 2.
    assert "iteration 3: rank 1: the loss of microbatch 1 is NaN" in text
    assert "samples 22, 23; --iterations-to-skip 3" in text
    assert text.count("BadNumbers: iteration 3") == 2
    [record] = map(json.loads, (tmp_path / bad_numbers.REPORT).read_text().splitlines())
    place = {"data_parallel_rank": 1, "microbatch": 1}
    assert record["iteration"] == 3 and record["samples"] == [{"number": n} | place for n in (22, 23)]


def test_a_bad_gradient_is_traced_to_its_rank(pool):
    with pytest.raises(WorkerError) as failed:
        pool.run(2, nan_in_a_gradient, flags(**BASE), 1)
    text = str(failed.value)
    assert "iteration 1: rank 1: NaN or Inf in the gradient of " in text
    assert "layers.0" in text and "rank 0: NaN" not in text


def test_bad_iterations_are_passed_over_up_to_the_limit(pool, tmp_path):
    argv = flags(**BASE | dict(skip_bad_iterations=2, save=tmp_path, save_interval=100))
    metrics = tmp_path / "metrics.jsonl"
    pool.run(2, nan_in_microbatch, [*argv, "--metrics-file", str(metrics)], 0, [2, 5], 0)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [record for record in records if "split" not in record]
    assert [step["iteration"] for step in steps if step["skipped"]] == [2, 5]
    assert [step["lm_loss"] is None for step in steps] == [False, True, False, False, True, False]
    assert len((tmp_path / bad_numbers.REPORT).read_text().splitlines()) == 2
    with pytest.raises(WorkerError, match="iteration 5: .*--skip-bad-iterations 2"):
        pool.run(2, nan_in_microbatch, flags(**BASE | dict(skip_bad_iterations=1)), 0, [2, 5], 0)


def test_a_passed_over_iteration_leaves_no_trace_in_the_weights(pool, tmp_path):
    """A bad iteration and one of --iterations-to-skip end in the same weights: those without it."""
    argv = flags(**BASE | dict(skip_bad_iterations=1))
    bad, skipped = tmp_path / "bad.jsonl", tmp_path / "skipped.jsonl"
    pool.run(2, nan_in_microbatch, [*argv, "--metrics-file", str(bad)], 0, [3], 0)
    pool.run(2, _pretrain, flags(**BASE | dict(iterations_to_skip=[3])) + ["--metrics-file", str(skipped)])
    found, expected = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (bad, skipped)
    )
    assert losses(found) == losses(expected)
    assert [step["skipped"] for step in expected[:6]] == [False, False, True, False, False, False]
    assert [step["consumed_samples"] for step in expected[:6]] == [8, 16, 24, 32, 40, 48]
    whole = losses(run(pool, 2))
    assert losses(expected)[:2] == whole[:2] and losses(expected)[3] != whole[3]
