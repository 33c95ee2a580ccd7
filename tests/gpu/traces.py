"""Runs of the real program on one device, in processes of their own, for the tests of this folder.

TEST_DEVICE=cuda (tests/gpu/run.sh sets it) runs them on a GPU. GPU_REHEARSAL=1 takes the CPU's local layers
in fp32, and shorter runs, in place of every GPU run instead, to check that the tests themselves work; it
shows nothing about a GPU.
GPU_RESULTS names a folder that keeps the records of every run as they come, whatever becomes of its test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.platform import engine
from tests.conftest import REPOSITORY
from tests.helpers.training import flags

REHEARSAL = os.environ.get("GPU_REHEARSAL") == "1"
GPU = torch.cuda.is_available()
no_gpu = None if GPU or REHEARSAL else "torch sees no GPU"
no_engine = (
    None if REHEARSAL else f"Transformer Engine: {engine.problem(GPU)}" if engine.problem(GPU) else None
)
needs_gpu = pytest.mark.skipif(no_gpu is not None, reason=no_gpu or "")
needs_engine = pytest.mark.skipif(no_engine is not None, reason=no_engine or "")

MODEL = dict(
    model_preset="small", num_layers=2, mock_data=True, tokenizer_type="NullTokenizer", vocab_size=8191,
    seq_length=128, micro_batch_size=2, global_batch_size=4, lr=1e-3, lr_decay_style="constant", eval_iters=0,
    log_interval=1000, num_workers=0, seed=7,
)  # fmt: skip

#: A model, and a number of iterations, in which FP8 and bf16 would differ if they do.
WIDE = dict(seq_length=512, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=4)
LONG = 200
if REHEARSAL:
    WIDE, LONG = {}, 25


def needs_recipe(recipe: str) -> pytest.MarkDecorator:
    """For tests of an FP8 recipe: skips them where it cannot run, and says why."""
    reason = no_engine or (None if REHEARSAL else engine.recipe_problem(recipe, *engine.gpu()))
    return pytest.mark.skipif(reason is not None, reason=f"--fp8-recipe {recipe} needs {reason}")


def run(folder: Path, name: str, iterations: int, device: str = "cuda", impl: str = "local", **changes):
    """Train; the records of every iteration."""
    if REHEARSAL:
        device, impl = "cpu", "local"
        left_out = ("fp8", "cuda", "bf16")
        changes = {key: value for key, value in changes.items() if not key.startswith(left_out)}
    metrics = Path(os.environ.get("GPU_RESULTS") or folder) / f"{name}.jsonl"
    metrics.unlink(missing_ok=True)
    values = MODEL | dict(train_iters=iterations, device=device, transformer_impl=impl, metrics_file=metrics)
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "pretrain_pangu_pro.py"), *flags(**values | changes)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def column(records: list[dict], name: str = "lm_loss") -> list[float]:
    """One value of each iteration."""
    return [record[name] for record in records]
