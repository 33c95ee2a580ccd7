"""What the tests of Triton kernels share: where they run, and how exactly."""

import os

import pytest
import torch

from megatron_ext.kernels import triton_language

#: tests/gpu/interpret.sh runs the kernels in Triton's interpreter, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = [
    pytest.mark.skipif(not triton_language.available(), reason="Triton is not installed"),
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="torch sees no GPU"),
]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """One rounding of the result; looser in the interpreter, which may cut bfloat16 off instead."""
    if dtype == torch.float32:
        return {"rtol": 2e-5, "atol": 2e-6}
    return {"rtol": torch.finfo(dtype).eps * (1.0 if INTERPRETED else 0.5), "atol": 1e-4}
