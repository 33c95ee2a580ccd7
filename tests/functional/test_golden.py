"""A run of Megatron-LM itself, continued: same checkpoint, data and flags, same numbers."""

import json

import pytest

from tests.helpers.training import flags, losses, pretrain, validation

DROPPED = {"--save", "--save-interval", "--data-cache-path", "--data-path"}


@pytest.fixture
def golden(shared, tmp_path):
    """Upstream's trace, and upstream's flags pointed at its files."""
    folder = shared / "reference" / "golden" / "gqa_1p"
    if not folder.is_dir():
        pytest.skip("needs the golden run of Megatron-LM")
    trace = json.loads((folder / "trace.json").read_text())
    words, argv = iter(trace["flags"]), []
    for word in words:
        if word in DROPPED:
            next(words)
        elif not word.startswith(("--tensor-model", "--pipeline-model")):
            argv.append(word)
    argv += ["--data-path", folder / "data" / "one_text_document", "--data-cache-path", tmp_path / "cache"]
    return trace, argv + ["--load", folder / "checkpoint"]


LAYOUTS = {
    "1p": (1, {}, 1e-5),
    "tp2": (2, {"tensor_model_parallel_size": 2}, 2e-5),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, 2e-5),
    "dp2": (2, {}, 2e-5),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 2e-5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_continues_megatron_lm(pool, golden, layout):
    trace, argv = golden
    processes, changes, tolerance = LAYOUTS[layout]
    records = pretrain(pool, processes, [*argv, *flags(**changes)])
    steps = [record for record in records if "split" not in record]
    assert [step["iteration"] for step in steps] == list(range(11, 21))
    assert losses(records) == pytest.approx(trace["lm_loss"][10:], rel=tolerance)
    assert [step["grad_norm"] for step in steps] == pytest.approx(trace["grad_norm"][10:], rel=5e-4)
    logged = trace["lr_logged_after_step"][10:]
    assert [step["learning_rate"] for step in steps] == pytest.approx(logged, rel=1e-12)
    assert [step["consumed_samples"] for step in steps] == trace["consumed_train_samples"][10:]
    expected = trace["eval"][0]["losses"]["lm loss"]
    assert validation(records)["lm_loss"] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("layout", ["1p", "tp2-pp2"])
def test_its_checkpoint_is_a_teacher(pool, golden, layout):
    """Of the model that goes on from it: they agree, until it has learned more."""
    trace, argv = golden
    processes, changes, tolerance = LAYOUTS[layout]
    taught = [*argv, "--teacher-load", argv[-1], "--distillation-temperature", "2"]
    steps = [r for r in pretrain(pool, processes, [*taught, *flags(**changes)]) if "split" not in r]
    assert steps[0]["lm_loss"] == pytest.approx(trace["lm_loss"][10], rel=tolerance)
    assert abs(steps[0]["distillation_loss"]) < 1e-6 < steps[1]["distillation_loss"]


#: What --use-checkpoint-args finds in the checkpoint.
SHAPE = {
    "--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads", "--num-query-groups",
    "--seq-length", "--max-position-embeddings", "--position-embedding-type", "--normalization",
    "--attention-dropout", "--hidden-dropout", "--tokenizer-type", "--vocab-size", "--group-query-attention",
    "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights",
}  # fmt: skip


def test_takes_the_model_from_the_checkpoint(pool, golden):
    trace, argv = golden
    kept, taken = [], False
    for word in map(str, argv):
        taken = word in SHAPE if word.startswith("--") else taken
        if not taken:
            kept.append(word)
    assert len(kept) < len(argv) - 10
    records = pretrain(pool, 1, [*kept, "--use-checkpoint-args"])
    assert losses(records) == pytest.approx(trace["lm_loss"][10:], rel=1e-5)


def _greedy(folder: str) -> list[int]:
    from megatron_ext.inference import Sampling, generate, load_for_inference

    model, tokenizer, _ = load_for_inference(folder)
    return list(generate(model, [72, 101, 108], 4, Sampling(temperature=0), tokenizer.vocab_size))


def test_megatron_lms_model_continues_text(pool, golden):
    """Its arguments lack ours, and contain objects of Megatron-Core where ours are plain values."""
    _, argv = golden
    alone, (first, second) = pool.run(1, _greedy, str(argv[-1])), pool.run(2, _greedy, str(argv[-1]))
    assert len(alone[0]) == 4 and alone[0] == first == second
