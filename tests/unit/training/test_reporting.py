"""Reports without a value: no invented number, and JSON that every parser reads."""

import json
import math

import pytest

from megatron_ext.arguments.parser import read_args
from megatron_ext.training.evaluation import Evaluation
from megatron_ext.training.reporting import IterationReport, Reporter

FLAGS = (
    "--model-preset tiny --tokenizer-type NullTokenizer --vocab-size 255 --mock-data --micro-batch-size 2 "
    "--train-iters 10 --lr 1e-3 --log-interval 4"
)


@pytest.fixture
def reporter(single_process, tmp_path):
    run = read_args([*FLAGS.split(), "--metrics-file", str(tmp_path / "metrics.jsonl")], world_size=1)
    found = Reporter(run.but(padded_vocab_size=256), 0)
    found.path = tmp_path / "metrics.jsonl"
    yield found
    found.close()


def report(iteration: int, **changes) -> IterationReport:
    values = dict(
        iteration=iteration, consumed_samples=2 * iteration, global_batch_size=2, lm_loss=2.5, grad_norm=1.0,
        consumed_tokens=64, learning_rate=1e-3, loss_scale=1.0, seconds=0.5, skipped=False,
    )  # fmt: skip
    return IterationReport(**values | changes)


def records(reporter) -> list[dict]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in reporter.path.read_text().splitlines()]


def test_no_loss_is_shown_where_nothing_was_trained_on(reporter, capsys):
    for iteration in range(1, 5):
        reporter.iteration(report(iteration, lm_loss=math.nan, grad_norm=math.inf, skipped=True))
    line = capsys.readouterr().out
    assert (
        "iteration        4/      10" in line and "lm loss" not in line and "skipped iterations:   4" in line
    )
    assert all(record["lm_loss"] is None and record["grad_norm"] is None for record in records(reporter))


def test_a_run_that_stops_between_two_lines_shows_the_last_iterations(reporter, capsys):
    for iteration in range(1, 7):
        reporter.iteration(report(iteration, lm_loss=float(iteration)))
    assert capsys.readouterr().out.count("lm loss: 2.500000E+00") == 1
    reporter.flush()
    assert capsys.readouterr().out.count("lm loss: 5.500000E+00") == 1
    reporter.flush()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("loss", [math.nan, math.inf, 30.0])
def test_held_out_losses_as_they_are(reporter, capsys, loss):
    """Upstream shows exp(20) as the perplexity of every loss above 20, and without a loss."""
    reporter.evaluation(Evaluation(loss, math.nan, tokens=64), 4, 8, "validation")
    [record] = records(reporter)
    assert record["lm_loss"] == (loss if math.isfinite(loss) else None) and record["bits_per_byte"] is None
    assert "4.851652E+08" not in capsys.readouterr().out


def test_an_evaluation_without_a_token(reporter, capsys):
    reporter.evaluation(Evaluation(math.nan, math.nan, tokens=0), 4, 8, "test")
    said = capsys.readouterr().out
    assert "no token counts" in said and "NAN" not in said and records(reporter) == []


def test_no_step_is_faster_than_the_machine(reporter):
    """The peak is measured at the start, when the machine may be busy with something else."""
    reporter.peak_flops = 1.0
    reporter.iteration(report(1, seconds=0.5))
    reporter.iteration(report(2, seconds=1.0))
    assert [record["mfu"] for record in records(reporter)] == [1.0, 0.5]
