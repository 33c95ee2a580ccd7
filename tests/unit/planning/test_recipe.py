"""A budget becomes a command: the formulas by hand, and a command that the trainer takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.arguments.parser import read_args
from megatron_ext.config import describe
from megatron_ext.config.describe import candidates
from megatron_ext.config.presets import preset
from megatron_ext.planning.recipe import best_shape, learning_rate, power_of_two, recipe
from tests.helpers.training import flags

REPOSITORY = Path(__file__).resolve().parents[3]
LIKE = preset("pangu-pi-1b-pro")


def test_step_law():
    """Its own example of scale: 1e9 parameters on 1e11 tokens, e^(ln 1.79 - 0.713 ln 1e9 + 0.307 ln 1e11)."""
    assert learning_rate(1e9, 1e11) == pytest.approx(1.6326e-3, rel=1e-4)


def test_the_shape_is_the_papers():
    model = best_shape(candidates(1.0e9, LIKE))
    assert (model.num_layers, model.hidden_size) == (20, 1792)
    assert 2.7 < model.ffn_hidden_size / model.hidden_size < 3


@pytest.mark.parametrize(("number", "power"), [(0.1, 1), (1.4, 1), (1.5, 2), (5.6, 4), (5.7, 8), (900, 512)])
def test_power_of_two(number, power):
    assert power_of_two(number, largest=1000) == power


def test_the_papers_bound_holds_the_batch_and_the_rate():
    model = best_shape(candidates(1.0e9, LIKE))
    words = dict(word.split() for choice in recipe(model, 1.6e12, 2048) for word in choice.flags)
    assert int(words["--global-batch-size"]) * 2048 == 2**21
    assert int(words["--train-iters"]) * 2**21 == pytest.approx(1.6e12, rel=1e-6)
    by_law = learning_rate(8.26e8, 1.6e12)
    assert float(words["--lr"]) == pytest.approx(by_law * (4e6 / 5.395e6) ** 0.5, rel=5e-3)


def test_the_trainer_takes_the_command():
    tool = [sys.executable, REPOSITORY / "tools/describe_model.py", "--design", "--json", "--params", "3e6"]
    done = subprocess.run(
        [*tool, "--vocab-size", "4096", "--tokens", "1.6e6", "--seq-length", "256"],
        capture_output=True,
        text=True,
    )
    words = " ".join(json.loads(done.stdout)["command"]).split()
    more = flags(tokenizer_type="NullTokenizer", vocab_size=4095, mock_data=True, micro_batch_size=1)
    run = read_args([*words, *more], world_size=1, device="cpu", check_files=False)
    assert run.training.train_iters * run.training.global_batch_size * 256 == pytest.approx(1.6e6, rel=0.01)
    assert describe.with_vocabulary(run).num_parameters == pytest.approx(3e6, rel=0.01)
