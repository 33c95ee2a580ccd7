"""What the tests of Triton kernels share: where they run, and how exactly."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from megatron_ext.kernels import fused, launch, triton_language

#: tests/gpu/interpret.sh runs the kernels in Triton's interpreter, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = [
    pytest.mark.skipif(not triton_language.available(), reason="Triton is not installed"),
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="torch sees no GPU"),
]


@contextmanager
def must_start(monkeypatch: pytest.MonkeyPatch, *kernels: str) -> Iterator[None]:
    """The Triton kernels take tensors of the CPU as well; these must have run at the end."""
    monkeypatch.setattr(fused, "_kernels", None)
    names: list[str] = []
    with launch.observed(lambda started: names.append(started.kernel) or True):
        yield
    assert set(kernels) <= set(names)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """One rounding of the result; looser in the interpreter, which may cut bfloat16 off instead."""
    if dtype == torch.float32:
        return {"rtol": 2e-5, "atol": 2e-6}
    return {"rtol": torch.finfo(dtype).eps * (1.0 if INTERPRETED else 0.5), "atol": 1e-4}
