"""Held-out losses: every sample once, at any batch and layout; an exhausted set starts over."""

import math

import pytest

from tests.functional.test_rounds import refusal
from tests.functional.test_run import BASE
from tests.helpers.training import flags, losses, pretrain, validation
from tests.unit.data import corpora

#: 25 samples of 32 tokens to validate on and 13 to test on: multiples of no batch below.
LENGTHS = [90] * 40 + [101] * 8 + [105] * 4


@pytest.fixture
def data(tmp_path) -> dict:
    prefix = corpora.make_dataset(tmp_path / "text", LENGTHS)
    shares = dict(data_path=prefix, split="40,8,4", data_cache_path=tmp_path / "cache")
    return BASE | dict(mock_data=None) | shares


WAYS = {
    "one at a time": (1, dict(micro_batch_size=1, global_batch_size=1)),
    "a batch above the set": (1, dict(micro_batch_size=2, global_batch_size=64)),
    "two ranks": (2, dict(micro_batch_size=2, global_batch_size=12)),
    "interleaved pipeline": (
        2,
        dict(
            num_layers=4, pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2,
            micro_batch_size=1, global_batch_size=4,
        ),
    ),
    "cyclic": (1, dict(micro_batch_size=4, global_batch_size=8, dataloader_type="cyclic")),
}  # fmt: skip


def held_out(records: list[dict]) -> dict[str, tuple[float, float]]:
    return {r["split"]: (r["lm_loss"], r["bits_per_byte"] or 0.0) for r in records if "split" in r}


def test_full_validation_looks_at_every_sample_once(pool, data):
    """The loss of one model depends on neither batch nor layout."""
    base = data | dict(full_validation=True, skip_train=True)
    found = {
        name: held_out(pretrain(pool, processes, flags(**base | dict(num_layers=4) | changes)))
        for name, (processes, changes) in WAYS.items()
    }
    reference = found["one at a time"]
    assert set(reference) == {"validation", "test"} and reference["test"] != reference["validation"]
    for name, losses_of in found.items():
        for split, values in losses_of.items():
            assert values == pytest.approx(reference[split], rel=1e-6), name


def test_full_validation_with_a_weighted_blend(pool, data, tmp_path):
    """The weights apply to training only; each held-out sample is still evaluated once."""
    other = corpora.make_dataset(tmp_path / "other", LENGTHS, seed=1)
    blends = ["0.9", data["data_path"], "0.1", other], ["0.2", data["data_path"], "0.8", other]
    base = data | dict(full_validation=True, skip_train=True)
    first, second, plain = (
        held_out(pretrain(pool, 1, flags(**base | dict(data_path=words))))
        for words in (*blends, [data["data_path"], other])
    )
    assert first == second == plain
    trained = [
        losses(pretrain(pool, 1, flags(**data | dict(data_path=words, eval_iters=0)))) for words in blends
    ]
    assert trained[0] != trained[1]


def test_validation_without_batches_is_left_out(pool, tmp_path):
    """--eval-iters 0 with a validation set and an interval."""
    prefix = corpora.make_dataset(tmp_path / "text", LENGTHS)
    values = dict(mock_data=None, train_data_path=prefix, valid_data_path=prefix, test_data_path=prefix)
    records = pretrain(pool, 1, flags(**BASE | values | dict(eval_iters=0, eval_interval=2, train_iters=2)))
    assert len(records) == 2 and not any("split" in record for record in records)


def test_validation_settings_may_change(pool, data, tmp_path):
    """Fewer or rarer validations, or other sets: an exhausted set starts over."""
    begun = data | dict(eval_iters=20, eval_interval=1, save=tmp_path / "run", save_interval=3)
    pretrain(pool, 1, flags(**begun | dict(exit_interval=3)))
    resumed = data | dict(load=tmp_path / "run")
    for changes in (
        dict(eval_iters=20, eval_interval=1),
        dict(eval_iters=1, eval_interval=1),
        dict(eval_iters=2, eval_interval=4, split="40,6,6"),
        dict(full_validation=True),
    ):
        records = pretrain(pool, 1, flags(**resumed | changes))
        assert records[0]["iteration"] == 4 or "split" in records[0]
        assert math.isfinite(validation(records)["lm_loss"])


def test_evaluation_alone_does_not_depend_on_what_was_validated_before(pool, data, tmp_path):
    """Two runs that trained alike and validated differently are the same model."""
    found = []
    for name, interval in (("often", 1), ("once", 6)):
        run = dict(save=tmp_path / name, save_interval=6, eval_iters=2, eval_interval=interval)
        pretrain(pool, 1, flags(**data | run))
        found.append(held_out(pretrain(pool, 1, flags(**data | dict(load=tmp_path / name, skip_train=True)))))
    assert found[0] == found[1]


def test_a_set_of_no_sample_is_an_error(pool, data):
    """A document of 105 tokens is one of 64, and none of 128."""
    one = data | dict(full_validation=True, split="51,1,0", train_iters=1, max_position_embeddings=128)
    assert held_out(pretrain(pool, 1, flags(**one | dict(seq_length=64))))
    text = refusal(pool, flags(**one | dict(seq_length=128)))
    assert "its valid set has 105 tokens, which is no sample of --seq-length 128" in text
