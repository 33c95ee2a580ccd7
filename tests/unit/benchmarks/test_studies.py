"""What the comparisons of whole runs compute from their ends: shares of tokens, rows, flags."""

import pytest

from benchmarks.optimizers import share_needed
from benchmarks.speedrun import flags_of, measured, table


def test_share_needed_is_on_the_line_in_log_tokens():
    """From 2.2 at half the tokens to 2.0 at all of them, 2.1 lies half-way in the logarithm."""
    assert share_needed((0.5, 1.0), (2.2, 2.0), 2.1) == pytest.approx(0.5**0.5)
    assert share_needed((0.5, 0.75, 1.0), (2.2, 2.15, 2.0), 2.0) == 1.0
    assert share_needed((0.5, 1.0), (2.2, 2.0), 2.3) == 0.5
    assert share_needed((0.5, 1.0), (2.2, 2.0), 1.9) is None


def test_flags_as_typed():
    words = "--optimizer muon --lr -1e-3 --bf16 --data-path 0.5 a 0.5 b".split()
    blend = ["0.5", "a", "0.5", "b"]
    assert flags_of(words) == {"optimizer": "muon", "lr": "-1e-3", "bf16": True, "data-path": blend}
    with pytest.raises(SystemExit, match="muon belongs to no flag"):
        flags_of(["muon", "--bf16"])


def test_a_row_counts_the_training_steps_alone():
    steps = [
        {"iteration": i, "elapsed_ms_per_iteration": 30_000.0, "consumed_tokens": 4096 * i} for i in (1, 2)
    ]
    found = measured({"a": [*steps, {"iteration": 2, "split": "validation", "bits_per_byte": 1.85}]})
    assert found == {"seconds": [60.0], "tokens": [8192], "bits_per_byte": [1.85]}
    row = {"name": "AdamW", "flags": "--lr 4e-3", "text": {"train.jsonl": "ab"}, "machine": "two cores"}
    faster = {"name": "Muon", "seconds": [30.0]}
    lines = table([row | found, row | found | faster]).splitlines()
    assert "| AdamW | 0.01 | 1.00 | 1.00 | 1.8500 | `--lr 4e-3` |" in lines
    assert any(line.startswith("| Muon | 0.01 | 0.50 | 0.50 |") for line in lines)
