"""Two results item by item."""

import copy
import random

import pytest

from megatron_ext.evaluation.documents import EvaluationError
from megatron_ext.harness import report, results
from megatron_ext.harness.compare import compare, told

NUMBERS = {"acc_bytes": True, "bits_per_byte": False}


def record(seed: int, items: int = 120) -> dict:
    draw = random.Random(seed)
    samples = [
        {"index": i, "prompt_hash": str(i), "choices": ["a", "b"]}
        | {"acc_bytes": float(draw.random() < 0.5), "bits_per_byte": 2 + (i % 7)}
        for i in range(items)
    ]
    metrics = {
        name: {"value": 1.0, "error": 0.1, "higher_is_better": better} for name, better in NUMBERS.items()
    }
    task = {
        "items": items,
        "truncated": 0,
        "chance": 0.5,
        "num_fewshot": 0,
        "metrics": metrics,
        "samples": samples,
    }
    return {
        "format": results.FORMAT,
        "model": f"model {seed}",
        "parameters": 1,
        "settings": {},
        "tasks": {"c3_cloze": task},
        "texts": {},
    }


def test_verdicts(tmp_path):
    a, b = record(1), record(2)
    draw = random.Random(0)
    for sample in b["tasks"]["c3_cloze"]["samples"]:
        sample["bits_per_byte"] -= 0.2 + 0.1 * draw.random()
    b["tasks"]["c3_cloze"]["samples"] = b["tasks"]["c3_cloze"]["samples"][:100]  # a smaller --limit
    results.write(a, tmp_path / "a")
    results.write(b, tmp_path / "b")
    found = {row["number"]: row for row in compare(str(tmp_path / "a"), str(tmp_path / "b"))["tasks"]}
    assert found["bits_per_byte"]["verdict"] == "B is better" and found["bits_per_byte"]["items"] == 100
    assert found["bits_per_byte"]["difference"] == pytest.approx(-0.25, abs=0.02)
    assert found["acc_bytes"]["verdict"] == "no difference beyond chance"
    back = compare(str(tmp_path / "b"), str(tmp_path / "a"))
    assert "A is better" in told(back)


def test_the_papers_table_has_a_row_of_this_model_or_is_left_out():
    found = record(1)
    assert "PanGu-π-1B Pro" in report.table(found) and "this model, cloze" in report.table(found)
    found["tasks"] = {"c3_bpb": found["tasks"]["c3_cloze"]}
    number = found["tasks"]["c3_bpb"]["metrics"]["bits_per_byte"]
    number["error"] = None  # as results.json has it for one item
    table = report.table(found)
    assert "PanGu-π-1B Pro" not in table and "| c3_bpb | bits_per_byte | 1.0000 |" in table


def test_items_may_hold_other_line_ends(tmp_path):
    a = record(1)
    a["tasks"]["c3_cloze"]["samples"][3]["context"] = "create\x85 a\u2028 b"
    results.write(a, tmp_path / "a")
    assert results.read(tmp_path / "a")["tasks"]["c3_cloze"]["samples"] == a["tasks"]["c3_cloze"]["samples"]


def test_other_questions_are_refused(tmp_path):
    a = record(1)
    b = copy.deepcopy(a)
    b["tasks"]["c3_cloze"]["samples"][3]["prompt_hash"] = "other"
    results.write(a, tmp_path / "a")
    results.write(b, tmp_path / "b")
    with pytest.raises(EvaluationError, match="asked differently"):
        compare(str(tmp_path / "a"), str(tmp_path / "b"))
    b = copy.deepcopy(a)
    b["tasks"]["c3_cloze"]["samples"][3]["gold"] = 1  # the same question with another key
    results.write(b, tmp_path / "b")
    with pytest.raises(EvaluationError, match="asked differently"):
        compare(str(tmp_path / "a"), str(tmp_path / "b"))
    (tmp_path / "b/results.json").write_text("[1]")
    with pytest.raises(EvaluationError, match="no results"):
        compare(str(tmp_path / "a"), str(tmp_path / "b"))
    (tmp_path / "a/items_c3_cloze.jsonl").write_text("{")
    with pytest.raises(EvaluationError, match="damaged"):
        compare(str(tmp_path / "a"), str(tmp_path / "b"))
