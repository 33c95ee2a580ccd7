"""Losses do not depend on the vocabulary's padding, unless a checkpoint was trained with it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.checkpoint import checkpoint_dir
from megatron_ext.checkpoint.integrity import CHECKSUMS
from megatron_ext.checkpoint.safe import load_object
from tests.helpers.training import flags, losses, pretrain, validation

RUN = dict(
    mock_data=True, tokenizer_type="NullTokenizer", vocab_size=256, num_layers=2, hidden_size=96,
    ffn_hidden_size=96, num_attention_heads=12, seq_length=32, max_position_embeddings=32, swiglu=True,
    position_embedding_type="rope", normalization="RMSNorm", disable_bias_linear=True, attention_dropout=0.0,
    hidden_dropout=0.0, micro_batch_size=2, global_batch_size=4, train_iters=6, lr=1e-2, weight_decay=0.1,
    lr_decay_style="constant", eval_iters=1, eval_interval=1000, log_interval=100, num_workers=0,
    untie_embeddings_and_output_weights=True,
)  # fmt: skip
TIED = {"untie_embeddings_and_output_weights": False}
TP2, TP3, TP4 = ({"tensor_model_parallel_size": size} for size in (2, 3, 4))
PP2 = {"pipeline_model_parallel_size": 2}


def run(pool, processes: int = 1, **changes) -> list[dict]:
    return pretrain(pool, processes, flags(**RUN | changes))


def same(found: list[dict], expected: list[dict], rel: float) -> None:
    """Losses, gradient norms and the validation are the same."""
    assert losses(found) == pytest.approx(losses(expected), rel=rel)
    norms = [[r["grad_norm"] for r in records if "split" not in r] for records in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=20 * rel)
    assert validation(found)["lm_loss"] == pytest.approx(validation(expected)["lm_loss"], rel=rel)


@pytest.fixture(scope="module")
def unpadded(pool) -> dict[str, list[dict]]:
    """Runs whose vocabulary has a row for each of 257 tokens and no other."""
    exact = {"make_vocab_size_divisible_by": 1}
    return {"untied": run(pool, **exact), "tied": run(pool, **exact | TIED)}


@pytest.mark.parametrize(
    ("tying", "processes", "unit", "layout"),
    [
        ("untied", 1, 128, {}),
        ("untied", 1, 512, {}),
        ("tied", 1, 512, {}),
        ("untied", 2, 1, TP2),
        ("tied", 2, 512, TP2),
        ("untied", 4, 512, TP4),
        ("tied", 4, 1024, TP4),
        ("untied", 2, 512, PP2),
        ("tied", 2, 512, PP2),
        ("tied", 4, 512, TP2 | PP2),
    ],
)
def test_losses_do_not_depend_on_padding(pool, unpadded, tying, processes, unit, layout):
    """Of 512 rows on four ranks the last two hold one token and none, of 1024 the last two none."""
    tied = TIED if tying == "tied" else {}
    found = run(pool, processes, make_vocab_size_divisible_by=unit, **layout, **tied)
    same(found, unpadded[tying], 2e-6 if processes == 1 else 2e-5)


def test_they_do_in_megatron_lms_softmax(pool, unpadded):
    found = run(pool, vocab_padding="in-softmax", padded_vocab_size=512)
    assert losses(found)[0] - losses(unpadded["untied"])[0] > 0.3


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The vocabulary's tensors in a checkpoint, with its optimizer's moments."""
    from megatron.core import dist_checkpointing
    from megatron.core.safe_globals import SAFE_GLOBALS

    with torch.serialization.safe_globals(SAFE_GLOBALS):
        tensors = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: t for name, t in tensors.items() if "word_embeddings" in name or "output_layer" in name}


def as_of_megatron_lm(folder: Path) -> None:
    """Remove everything from a checkpoint that Megatron-LM would not save."""
    common = load_object(folder / "common.pt")
    for ours in ("softmax_vocab_size", "vocab_padding", "tokenizer_sha256", "series_activation_order"):
        delattr(common["args"], ours)
    del common["pangu_pro"]
    torch.save(common, folder / "common.pt")
    (folder / CHECKSUMS).unlink()


@pytest.fixture(scope="module")
def upstream(pool, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A checkpoint of 512 rows, all of them in the softmax, after 3 of 6 iterations; the whole run."""
    folder = tmp_path_factory.mktemp("upstream")
    saving = dict(save=folder, save_interval=3, vocab_padding="in-softmax", padded_vocab_size=512)
    records = run(pool, **saving)
    shutil.rmtree(checkpoint_dir(folder, 6))
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    as_of_megatron_lm(checkpoint_dir(folder, 3))
    return folder, records


@pytest.mark.parametrize(("processes", "layout"), [(1, {}), (2, TP2), (3, TP3), (2, PP2)])
def test_a_checkpoint_of_megatron_lm_goes_on_as_it_was_trained(pool, upstream, processes, layout):
    """Without a flag, also where rows do not divide: 512 become 768 on three ranks, the new ones masked."""
    folder, records = upstream
    found = run(pool, processes, load=folder, **layout)
    expected = records[3:]
    assert [r["iteration"] for r in found if "split" not in r] == [4, 5, 6]
    same(found, expected, 1e-7 if processes == 1 else 2e-5)


def test_it_goes_on_without_its_padding_where_that_is_asked_for(pool, upstream):
    folder, records = upstream
    found = losses(run(pool, load=folder, vocab_padding="masked"))
    assert found[0] < 0.99 * losses(records)[3]


@pytest.mark.parametrize("way", ["masked", "in-softmax"])
def test_a_resumed_run_keeps_what_it_began_with(pool, tmp_path, way):
    whole = run(pool, vocab_padding=way)
    first = dict(save=tmp_path, save_interval=3)
    run(pool, vocab_padding=way, **first, exit_interval=3)
    resumed = run(pool, load=tmp_path)
    same(resumed, whole[3:], 1e-7)
    on_two = run(pool, 2, load=tmp_path, make_vocab_size_divisible_by=512, **TP2)
    same(on_two, whole[3:], 2e-5)


def test_padding_rows_are_never_trained(pool, tmp_path):
    """Their gradients are exactly 0: no moment moves, and only the weight decay changes the rows."""
    run(pool, save=tmp_path, save_interval=6, weight_decay=0.0)
    first = pool.run(1, weights, checkpoint_dir(tmp_path, 6))[0]
    run(pool, save=tmp_path / "other", save_interval=1, train_iters=1, weight_decay=0.0)
    begun = pool.run(1, weights, checkpoint_dir(tmp_path / "other", 1))[0]
    assert len(first) == 6
    for name, tensor in first.items():
        assert tensor.size(0) == 384
        if "exp_avg" in name:
            assert not tensor[257:].any() and tensor[:257].any()
        else:
            assert torch.equal(tensor[257:], begun[name][257:])


def test_recorded_losses_do_not_depend_on_padding(pool, tmp_path):
    run(pool, save=tmp_path / "ck", save_interval=6, make_vocab_size_divisible_by=1)
    found = {}
    for unit, processes, layout in ((1, 1, {}), (512, 1, {}), (512, 4, TP4)):
        path = tmp_path / f"losses_{unit}_{processes}.npy"
        argv = flags(
            **RUN | layout, load=tmp_path / "ck", make_vocab_size_divisible_by=unit, record_sample_loss=path
        )
        pool.run(processes, _record, list(map(str, argv)), timeout=240.0)
        found[unit, processes] = np.load(path)
    for recorded in found.values():
        np.testing.assert_allclose(recorded, found[1, 1], rtol=1e-5)
    with pytest.raises(Exception, match="begun with another model or other options .*softmax_vocab_size"):
        pool.run(
            1, _record, [*map(str, argv), "--tensor-model-parallel-size=1", "--vocab-padding=in-softmax"]
        )


def _record(argv: list[str]) -> None:
    import pretrain_pangu_pro

    pretrain_pangu_pro.main(argv)
