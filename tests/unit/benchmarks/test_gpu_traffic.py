"""The counter of operators and bytes, and what the kernels must save by its count."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu_traffic_counter import moved, size_of

aten = torch.ops.aten
BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu_traffic.py"


def bytes_of(operator, *args, **kwargs) -> int:
    return moved(operator, args, kwargs, operator(*args, **kwargs))


def test_bytes_of_an_operator():
    x, half = torch.ones(6, 10), torch.ones(6, 10, dtype=torch.bfloat16)
    row, ids = torch.ones(10).expand(6, 10), torch.tensor([1, 1, 3])
    assert size_of(row) == 40
    assert bytes_of(aten.add.Tensor, x, row) == 240 + 40 + 240
    assert bytes_of(aten.mul_.Tensor, x, x) == 3 * 240
    assert bytes_of(aten.copy_.default, x, half) == 120 + 240
    assert bytes_of(aten.zero_.default, x) == 240
    assert bytes_of(aten.ones_like.default, x) == 240
    assert bytes_of(aten.view.default, x, [60]) == bytes_of(aten.detach.default, x) == 0
    assert bytes_of(aten.t.default, x) == bytes_of(aten.empty_like.default, x) == 0
    assert bytes_of(aten.cat.default, [x, half.float()], 1) == 4 * 240
    assert bytes_of(aten.embedding.default, x, ids) == 24 + 2 * 120
    assert bytes_of(aten.index_put_.default, x, [ids], torch.ones(3, 10)) == 24 + 120 + 120
    assert bytes_of(aten._foreach_mul_.Scalar, [x, x], 2.0) == 4 * 240
    assert bytes_of(aten._foreach_norm.Scalar, [x, x]) == 2 * 240 + 2 * 4


def test_what_the_kernels_save():
    """The bars of docs/speed.md, at 1.5b-pro in bf16 with a micro batch of 4."""
    run = subprocess.run([sys.executable, BENCHMARK, "--json"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    layer, ends, waits = "a layer, a micro batch", "embedding, output and loss, a micro batch", "waits"

    def moved_by(variant: str, place: str, part: str | None = None) -> float:
        parts = found[variant][place]
        return sum(size for name, (_, size) in parts.items() if part in (None, name)) / 1e6

    assert moved_by("now", layer) <= 0.6 * moved_by("before", layer)
    assert moved_by("now", layer, "rotary embedding") <= 0.2 * moved_by("before", layer, "rotary embedding")
    assert moved_by("now", ends, "cross entropy") <= 0.12 * moved_by("before", ends, "cross entropy")
    # An independent count of the state before found 4.5 GB a layer and 20.4 GB of cross entropy.
    assert 4000 < moved_by("before", layer) < 4600
    assert 20000 < moved_by("before", ends, "cross entropy") < 21000
    assert found["now"][waits] <= 5 < 200 < found["before"][waits]
