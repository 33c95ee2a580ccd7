"""Changes of a resumed run: each one works as intended, or is refused with the flags to resolve it."""

import json

import pytest
import torch

from tests.functional.test_rounds import refusal
from tests.functional.test_run import BASE
from tests.helpers.training import flags, losses, pretrain
from tests.unit.data import corpora

WAYS = ("--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler")
#: 33 samples of 32 tokens in an epoch.
LENGTHS = [40, 90, 33, 60, 17, 80] * 4


@pytest.fixture
def data(tmp_path) -> dict:
    prefix = corpora.make_dataset(tmp_path / "text", LENGTHS)
    shares = dict(data_path=prefix, split="90,10,0", data_cache_path=tmp_path / "cache")
    return BASE | dict(mock_data=None, eval_iters=0, global_batch_size=4) | shares


@pytest.fixture
def begun(pool, data, tmp_path) -> dict:
    """The flags of a run of 6 iterations, stopped after 3."""
    values = data | dict(save=tmp_path / "run", save_interval=3)
    pretrain(pool, 1, flags(**values | dict(exit_interval=3)))
    return data | dict(load=tmp_path / "run")


def steps(records: list[dict]) -> list[dict]:
    return [record for record in records if "split" not in record]


def rates(records: list[dict]) -> list[float]:
    return [record["learning_rate"] for record in steps(records)]


def test_another_training_set_is_refused(pool, begun, data, tmp_path):
    other = corpora.make_dataset(tmp_path / "other", LENGTHS, seed=3)
    changes = {
        "--data-path": dict(data_path=other),
        "--seed: 1234 there, 99 here": dict(seed=99),
        "--split: 0.0000% to 90.0000% there, 0.0000% to 50.0000% here": dict(split="50,50,0"),
        "--seq-length: 32 there, 16 here": dict(seq_length=16),
        "the weights of the blend": dict(data_path=["1", data["data_path"], "2", data["data_path"]]),
        "--mock-data": dict(mock_data=True, data_path=None, split=None, data_cache_path=None),
        "--dataloader-type: single there, cyclic here": dict(dataloader_type="cyclic"),
    }
    for message, change in changes.items():
        text = refusal(pool, flags(**begun | change))
        assert message in text and "another training set" in text
        assert "--override-training-set" in text and "--finetune" in text
    text = refusal(pool, flags(**begun | dict(seed=9, seq_length=16, lr=0.5)))
    assert all(
        word in text for word in ("--seed", "--seq-length", "another schedule (--lr: 0.01 there", *WAYS)
    )


def test_the_same_data_elsewhere_goes_on(pool, begun, data, tmp_path):
    corpora.make_dataset(tmp_path / "moved", LENGTHS)
    moved = pretrain(pool, 1, flags(**begun | dict(data_path=tmp_path / "moved")))
    assert losses(moved) == losses(pretrain(pool, 1, flags(**begun)))


def test_another_training_set_that_is_meant_is_read_from_its_beginning(pool, begun, data, tmp_path):
    """A restart of that run, from a later checkpoint, equals the uninterrupted run."""
    other = corpora.make_dataset(tmp_path / "other", LENGTHS, seed=3)
    save = dict(save=tmp_path / "second", save_interval=1)
    values = begun | dict(data_path=other, override_training_set=True)
    whole = pretrain(pool, 1, flags(**values | save))
    assert [step["iteration"] for step in steps(whole)] == [4, 5, 6]
    resumed = pretrain(pool, 1, flags(**values | dict(load=tmp_path / "second", ckpt_step=5)))
    assert losses(resumed) == losses(whole)[2:]
    # Its first batch is that of a run that begins with it, from the same weights.
    fresh = data | dict(data_path=other, pretrained_checkpoint=tmp_path / "run", load=tmp_path / "none")
    first = pretrain(pool, 1, flags(**fresh | dict(train_iters=3)))
    assert losses(first)[0] == losses(whole)[0]


def read_samples(argv: list[str], losses_file: str) -> None:
    """A run that records which samples it reads, by their first tokens."""
    import pretrain_pangu_pro
    from megatron_ext.training import step

    original, seen = step.batches.next_batch, []

    def next_batch(iterator):
        batch = original(iterator)
        seen.extend(tuple(row) for row in batch.tokens.tolist())
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.batches, "next_batch", next_batch)
        pretrain_pangu_pro.main(argv)
    with open(losses_file, "w", encoding="utf-8") as file:
        json.dump(seen, file)


def samples_of(pool, values: dict, tmp_path) -> list[tuple]:
    pool.run(1, read_samples, flags(**values), str(tmp_path / "seen.json"), timeout=120)
    return [tuple(sample) for sample in json.loads((tmp_path / "seen.json").read_text())]


@pytest.mark.parametrize("kind", ["one dataset", "weighted blend", "blend"])
def test_a_longer_run_keeps_the_order_and_repeats_nothing_within_an_epoch(pool, data, tmp_path, kind):
    """Upstream shuffles all epochs together, so that another epoch changes the earlier ones."""
    other = corpora.make_dataset(tmp_path / "other", LENGTHS, seed=3)
    words = {"one dataset": [data["data_path"]], "blend": [data["data_path"], other]}
    words["weighted blend"] = ["1", data["data_path"], "1", other]
    values = data | dict(data_path=words[kind], lr_decay_style="constant")
    planned = dict(train_iters=8)
    whole = samples_of(pool, values | planned, tmp_path)
    assert len(set(whole)) == len(whole) == 32
    stopped = values | dict(save=tmp_path / "run", save_interval=4)
    first = samples_of(pool, stopped | planned | dict(exit_interval=4), tmp_path)
    goes_on = stopped | dict(load=tmp_path / "run")
    longer = samples_of(pool, goes_on | dict(train_iters=20, exit_interval=12), tmp_path)
    assert first + longer[:16] == whole
    seen = first + longer
    assert len(seen) == 48
    # Again longer, from within what came in addition: still the same order.
    again = samples_of(pool, goes_on | dict(train_iters=40, exit_interval=16), tmp_path)
    uninterrupted = samples_of(
        pool, goes_on | dict(train_iters=40, ckpt_step=8, save=None, save_interval=None), tmp_path
    )
    assert uninterrupted[:16] == longer[16:]
    assert uninterrupted[16:32] == again


def test_a_longer_run_is_told_of_its_schedule(pool, begun):
    text = refusal(pool, flags(**begun | dict(train_iters=12)))
    assert "--lr-decay-iters (by default --train-iters): 6 there, 12 here" in text
    assert all(way in text for way in WAYS) and "AssertionError" not in text
    by_flags = pretrain(pool, 1, flags(**begun | dict(train_iters=12, override_opt_param_scheduler=True)))
    assert len(steps(by_flags)) == 9 and rates(by_flags)[-1] == pytest.approx(1e-3)
    as_before = pretrain(
        pool, 1, flags(**begun | dict(train_iters=12, use_checkpoint_opt_param_scheduler=True))
    )
    assert rates(as_before)[:3] == rates(pretrain(pool, 1, flags(**begun)))
    assert rates(as_before)[3:] == [1e-3] * 6  # --min-lr
    constant = dict(lr_decay_style="constant", override_opt_param_scheduler=True)
    assert rates(pretrain(pool, 1, flags(**begun | constant))) == [1e-2] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lr=0.02), "--lr: 0.01 there, 0.02 here"),
        (dict(min_lr=0.0), "--min-lr: 0.001 there, 0 here"),
        (dict(lr_decay_style="linear"), "--lr-decay-style: cosine there, linear here"),
        (dict(lr_warmup_iters=2), "--lr-warmup-iters (or --lr-warmup-fraction): 0 there, 2 here"),
        (dict(weight_decay=0.5), "--weight-decay: 0.01 there, 0.5 here"),
        (dict(adam_beta2=0.95), "--adam-beta2: 0.999 there, 0.95 here"),
        (
            dict(train_iters=None, train_samples=32),
            "--lr-decay-samples (by default --train-samples): 24 there, 32 here",
        ),
    ],
)
def test_another_schedule_is_refused_or_taken(pool, begun, change, message):
    text = refusal(pool, flags(**begun | change))
    assert message in text and all(way in text for way in WAYS)
    plain = pretrain(pool, 1, flags(**begun))
    ours = pretrain(pool, 1, flags(**begun | change | dict(override_opt_param_scheduler=True)))
    assert losses(ours) != losses(plain) or rates(ours) != rates(plain)
    if "train_samples" not in change:
        theirs = pretrain(pool, 1, flags(**begun | change | dict(use_checkpoint_opt_param_scheduler=True)))
        assert losses(theirs) == losses(plain) and rates(theirs) == rates(plain)


def test_samples_for_iterations_is_no_other_schedule(pool, begun):
    in_samples = pretrain(pool, 1, flags(**begun | dict(train_iters=None, train_samples=24)))
    assert losses(in_samples) == losses(pretrain(pool, 1, flags(**begun)))


@pytest.mark.parametrize("batch", [2, 8, 6])
def test_another_batch_in_iterations(pool, begun, batch):
    """The schedule continues at the run's iteration, and the samples at their position."""
    plain = pretrain(pool, 1, flags(**begun))
    changed = pretrain(pool, 1, flags(**begun | dict(global_batch_size=batch)))
    assert rates(changed) == pytest.approx(rates(plain), rel=1e-9)
    assert [step["consumed_samples"] for step in steps(changed)] == [12 + batch * k for k in (1, 2, 3)]


def test_another_optimizer_is_refused(pool, begun):
    text = refusal(pool, flags(**begun | dict(optimizer="sgd", seq_length=16)))
    assert (
        "--optimizer: adam there, sgd here" in text and "--no-load-optim" in text and "--seq-length" in text
    )
    assert len(steps(pretrain(pool, 1, flags(**begun | dict(optimizer="sgd", no_load_optim=True))))) == 3


def test_another_batch_twice(pool, begun, tmp_path):
    """Each time from the position in a checkpoint that was written with the previous batch size."""
    save = dict(save=tmp_path / "run", save_interval=1, global_batch_size=2)
    pretrain(pool, 1, flags(**begun | save | dict(exit_interval=4)))
    third = pretrain(pool, 1, flags(**begun | dict(global_batch_size=8)))
    assert rates(third) == pytest.approx(rates(pretrain(pool, 1, flags(**begun | dict(ckpt_step=3))))[1:])


@pytest.mark.parametrize("batch", [2, 8, 12])
def test_another_batch_in_samples(pool, data, tmp_path, batch):
    """All samples are trained on, with their learning rates."""
    values = data | dict(train_iters=None, train_samples=36)
    pretrain(pool, 1, flags(**values | dict(save=tmp_path / "run", save_interval=3, exit_interval=3)))
    resumed = pretrain(pool, 1, flags(**values | dict(load=tmp_path / "run", global_batch_size=batch)))
    assert [s["consumed_samples"] for s in steps(resumed)] == list(range(12 + batch, 37, batch))
    assert rates(resumed)[-1] == pytest.approx(1e-3)


def test_a_ramp_up_that_is_added(pool, data, tmp_path):
    values = data | dict(train_iters=None, train_samples=36)
    pretrain(pool, 1, flags(**values | dict(save=tmp_path / "run", save_interval=3, exit_interval=3)))
    ramp = dict(rampup_batch_size=[2, 2, 20], global_batch_size=8)
    resumed = pretrain(pool, 1, flags(**values | ramp | dict(load=tmp_path / "run")))
    assert steps(resumed)[-1]["consumed_samples"] > 28 and rates(resumed)[-1] < 2e-3


@pytest.mark.parametrize("ranks", [1, 2])
def test_more_and_fewer_ranks(pool, data, tmp_path, ranks):
    """With --global-batch-size nothing changes; without it the batch follows the ranks."""
    values = data | dict(micro_batch_size=2)
    run = dict(save=tmp_path / "run", save_interval=3)
    pretrain(pool, 3 - ranks, flags(**values | run | dict(exit_interval=3)))
    goes_on = values | dict(load=tmp_path / "run")
    there, here = (pretrain(pool, n, flags(**goes_on)) for n in (3 - ranks, ranks))
    assert losses(here) == pytest.approx(losses(there), rel=1e-5)
    assert rates(pretrain(pool, ranks, flags(**goes_on | dict(global_batch_size=None)))) == pytest.approx(
        rates(there)
    )


def test_batches_rounded_down_are_counted_as_they_are(pool, data, tmp_path):
    """--decrease-batch-size-if-needed: a resumed run reads on where it stopped; the rate decays fully."""
    values = data | dict(global_batch_size=5, decrease_batch_size_if_needed=True, save_interval=3)
    whole = pretrain(pool, 1, flags(**values | dict(save=tmp_path / "run")))
    assert [s["consumed_samples"] for s in steps(whole)] == [4, 8, 12, 16, 20, 24]
    assert rates(whole)[-1] == pytest.approx(1e-3)
    resumed = pretrain(
        pool, 1, flags(**values | dict(load=tmp_path / "run", ckpt_step=3, save_interval=None))
    )
    assert losses(resumed) == losses(whole)[3:]


def test_evaluating_alone_compares_neither_schedule_nor_training_set(pool, begun):
    records = pretrain(
        pool, 1, flags(**begun | dict(skip_train=True, eval_iters=1, lr=0.5, seed=5, train_iters=99))
    )
    assert [record["split"] for record in records] == ["validation"]


def test_checkpoints_without_a_description(pool, begun, tmp_path):
    """As a checkpoint of Megatron-LM: its arguments are compared."""
    common = tmp_path / "run" / "iter_0000003" / "common.pt"
    content = torch.load(common, weights_only=False)
    del content["pangu_pro"]
    torch.save(content, common)
    (common.parent / "checksums.json").unlink()
    for change, message in (
        (dict(seed=5), "--seed: 1234 there, 5 here"),
        (dict(split="80,20,0"), "--split: 0.0000% to 90.0000% there"),
        (dict(seq_length=16), "--seq-length: 32 there"),
    ):
        assert message in refusal(pool, flags(**begun | change))
    assert len(steps(pretrain(pool, 1, flags(**begun)))) == 3
