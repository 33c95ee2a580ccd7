"""The main job on real text: every layout prints the same losses, from the same initial weights.

English, Chinese and code, blended; fp32, no dropout. TRACE_ITERATIONS=30 runs the long form.
"""

import gzip
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.helpers.training import flags, losses, pretrain, validation

ITERATIONS = int(os.environ.get("TRACE_ITERATIONS", 6))
DOCUMENTS = 60

PI_ON = {"series_activation_order": 2, "augmented_shortcuts": 1, "augmented_shortcut_reduction": 8}
#: Documents apart; the middle stages of a pipeline need to know of them, too.
DOCUMENTS_APART = PI_ON | {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
OPTIONS = {"pi": PI_ON, "plain": {}, "documents": DOCUMENTS_APART}
LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2-interleaved": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ),
    "dp2": (2, {}),
    "dp2-distributed-optimizer": (2, {"use_distributed_optimizer": True}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2-sequence-parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2-pp2-dp2": (
        8,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            "sequence_parallel": True,
        },
    ),
}


@pytest.fixture(scope="module")
def blend(shared, tmp_path_factory):
    """The flags that name three small datasets and their tokenizer."""
    folder = tmp_path_factory.mktemp("blend")
    tokenizer = shared / "data" / "tokenizers" / "llama-32000.model"
    prefixes = []
    for language in ("en", "zh", "code"):
        source = shared / "data" / "corpus" / f"valid_{language}.jsonl.gz"
        text = folder / f"{language}.jsonl"
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            text.write_text("".join(line for line, _ in zip(lines, range(DOCUMENTS), strict=False)), "utf-8")
        command = [
            sys.executable,
            REPOSITORY / "tools" / "preprocess_data.py",
            "--workers",
            "1",
            "--append-eod",
        ]
        command += flags(
            input=text, output_prefix=folder / language, tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=tokenizer,
        )  # fmt: skip
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        prefixes.append(folder / f"{language}_text_document")
    weights = [0.5, 0.3, 0.2]
    words = [item for pair in zip(weights, prefixes, strict=True) for item in pair]
    return flags(
        data_path=words, split="80,20,0", data_cache_path=folder / "cache",
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=tokenizer,
    )  # fmt: skip


def trace(pool, blend, processes: int, **changes) -> tuple[list[float], dict]:
    values = dict(
        num_layers=4, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, group_query_attention=True,
        num_query_groups=2, seq_length=64, max_position_embeddings=64, position_embedding_type="rope",
        normalization="RMSNorm", swiglu=True, disable_bias_linear=True, attention_dropout=0.0,
        hidden_dropout=0.0, untie_embeddings_and_output_weights=True, micro_batch_size=2,
        global_batch_size=8, train_iters=ITERATIONS, lr=2e-3, min_lr=2e-4, lr_decay_style="cosine",
        lr_warmup_iters=2, weight_decay=0.1, eval_iters=1, eval_interval=1000, log_interval=100,
        num_workers=0, seed=99,
    )  # fmt: skip
    records = pretrain(pool, processes, blend + flags(**values | changes))
    return losses(records), validation(records)


@pytest.fixture(scope="module")
def references(pool, blend) -> dict:
    return {name: trace(pool, blend, 1, **options) for name, options in OPTIONS.items()}


CASES = [("pi", layout) for layout in LAYOUTS if layout != "pp4"]
CASES += [("plain", layout) for layout in ("tp2", "pp2", "dp2")]
CASES += [("documents", layout) for layout in ("tp2-sequence-parallel", "pp4")]
if ITERATIONS >= 30:
    CASES = [(option, layout) for option in OPTIONS for layout in LAYOUTS]


@pytest.mark.parametrize(("option", "layout"), CASES)
def test_losses_do_not_depend_on_the_layout(pool, blend, references, option, layout):
    processes, changes = LAYOUTS[layout]
    found, valid = trace(pool, blend, processes, **OPTIONS[option] | changes)
    expected, expected_valid = references[option]
    assert len(found) == ITERATIONS
    assert found == pytest.approx(expected, rel=2e-5)
    assert valid["lm_loss"] == pytest.approx(expected_valid["lm_loss"], rel=2e-5)
    assert valid["bits_per_byte"] == pytest.approx(expected_valid["bits_per_byte"], rel=2e-5)


def test_loss_falls(references):
    for found, _ in references.values():
        assert found[-1] < found[0] - 0.15


def test_golden_trace_is_ours(references, request):
    """The trace in golden/ was made by this program; changes of it must be intended."""
    stored = REPOSITORY / "tests" / "functional" / "golden" / "blend.json"
    if ITERATIONS != 6:
        pytest.skip("the stored trace has 6 iterations")
    found = {name: values for name, (values, _) in references.items()}
    if os.environ.get("UPDATE_GOLDEN"):
        stored.parent.mkdir(exist_ok=True)
        stored.write_text(json.dumps(found, indent=1) + "\n")
    for name, values in json.loads(stored.read_text()).items():
        assert found[name] == pytest.approx(values, rel=1e-5)
