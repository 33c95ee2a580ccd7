"""Where Triton kernels are chosen and started, and where the memory that they move can be counted.

Each launch names the tensors that its kernel reads and writes, each element once. So
benchmarks/gpu_traffic.py can count a step without a GPU and without Triton; that the names are true is
tested against the loads and stores that Triton's interpreter sees (tests/gpu/test_traffic_triton.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_STORAGE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: its name, and the tensors (views) that it reads and writes once."""

    kernel: str
    reads: Sequence[Tensor]
    writes: Sequence[Tensor]


#: Called with every launch; if it returns False the kernel is not started.
_observer: Callable[[Launch], bool] | None = None


@contextmanager
def observed(observer: Callable[[Launch], bool]) -> Iterator[None]:
    """Within it ``observer`` sees every launch, and kernels are chosen on any device."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def supports(*tensors: Tensor) -> bool:
    """Whether a Triton kernel can take these: floating, on a GPU, and Triton imports."""
    if not all(t.dtype in _STORAGE for t in tensors):
        return False
    if _observer is not None:
        return True
    if not all(t.is_cuda for t in tensors):
        return False
    from megatron_ext.kernels import triton_language

    return triton_language.available()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    reads: Sequence[Tensor],
    writes: Sequence[Tensor],
    **constants: Any,
) -> None:
    """Start ``kernel[grid](*arguments, **constants)``, which reads and writes the tensors named."""
    if _observer is None or _observer(Launch(kernel.__name__, reads, writes)):
        kernel[grid](*arguments, **constants)
