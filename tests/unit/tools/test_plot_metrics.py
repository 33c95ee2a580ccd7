"""tools/plot_metrics.py: what it reads from a metrics file, and the picture it leaves."""

import importlib.util
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
SPEC = importlib.util.spec_from_file_location("plot_metrics", REPOSITORY / "tools" / "plot_metrics.py")
plot_metrics = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plot_metrics)


def record(iteration: int, loss: float) -> dict:
    tokens = {"consumed_tokens": 64 * iteration, "consumed_samples": iteration, "tokens_per_second": 100.0}
    return {"iteration": iteration, "lm_loss": loss} | tokens


def write(path: Path, records: list[dict], end: str = "") -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    return path


def test_iterations_run_again_replace_the_earlier(tmp_path):
    validation = {"iteration": 2, "split": "validation", "lm_loss": 4.5, "bits_per_byte": 2.0}
    tasks = {"iteration": 0, "split": "tasks", "c3_cloze/acc_bytes": 0.25}  # of --eval-tasks: no loss
    records = [tasks, record(1, 5.0), record(2, 4.0), validation, record(2, 3.5), record(3, 3.0)]
    path = write(tmp_path / "m.jsonl", records, end='{"iteration": 4, "lm_l')
    training, validations = plot_metrics.read_run(path)
    assert [r["lm_loss"] for r in training] == [5.0, 3.5, 3.0]
    assert plot_metrics.summary(training, validations) == {
        "iterations": 3,
        "first_loss": 5.0,
        "last_loss": 3.0,
        "consumed_tokens": 192,
        "tokens_per_second": 100.0,
        "first_validation_loss": 4.5,
        "last_validation_loss": 4.5,
        "last_bits_per_byte": 2.0,
    }


def test_picture_and_summary(tmp_path, capsys):
    runs = [write(tmp_path / f"{n}.jsonl", [record(i, 5.0 - n / i) for i in range(1, 9)]) for n in (1, 2)]
    picture = tmp_path / "made" / "loss.png"
    assert plot_metrics.main([*map(str, runs), "--output", str(picture), "--json"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(capsys.readouterr().out)["runs"][str(runs[1])]["last_loss"] == 4.75


@pytest.mark.parametrize("content", ["not json\n", '{"lm_loss": 1}\n', "[]\n", ""])
def test_other_files_are_refused(tmp_path, capsys, content):
    path = tmp_path / "other.jsonl"
    path.write_text(content)
    assert plot_metrics.main([str(path), "--output", str(tmp_path / "loss.png")]) == 1
    assert "other.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "loss.png").exists()


def test_running_mean_does_not_lag():
    nan = float("nan")
    assert plot_metrics.running_mean([3.0, nan, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert plot_metrics.running_mean([9.0, 7.0, 5.0, 3.0]) == pytest.approx([9.0, 7.0, 5.0, 3.0])


def test_files_are_named_by_what_tells_them_apart():
    assert plot_metrics.short_names(["runs/a/m.jsonl"]) == ["m"]
    assert plot_metrics.short_names(["runs/a/m.jsonl", "runs/b/m.jsonl"]) == ["a/m", "b/m"]
    assert plot_metrics.short_names(["x/from_l2.jsonl", "x/from_l1.jsonl"]) == ["from_l2", "from_l1"]


def test_the_curve_in_the_terminal(tmp_path, capsys):
    """It falls from the upper left to the lower right, with the other run's name in the legend."""
    pytest.importorskip("uniplot")
    a = write(tmp_path / "a.jsonl", [record(i, 8 / i) for i in range(1, 60)])
    b = write(tmp_path / "b.jsonl", [record(i, 4.0) for i in range(1, 60)])
    assert plot_metrics.main([str(a), "--output", str(tmp_path / "a.png"), "--terminal"]) == 0
    rows = [line.split("│")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    first, *_, last = (row for row in rows if row.strip())
    assert first[:5].strip() and not first[20:].strip() and last[40:].strip() and not last[:10].strip()
    assert plot_metrics.main([str(a), str(b), "--output", str(tmp_path / "a.png"), "--terminal"]) == 0
    assert "██ a" in capsys.readouterr().out
