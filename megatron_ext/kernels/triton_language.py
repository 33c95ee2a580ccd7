"""Triton's names where it is installed and imports; imported with the first kernel: it takes seconds."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # not installed, or broken: megatron_ext/common/optional.py
    triton, tl = None, SimpleNamespace(constexpr=None)  # what the kernels' signatures name


def available() -> bool:
    """Whether Triton is installed and imports."""
    return triton is not None


def jit(function: Callable[..., None]) -> Any:
    """``triton.jit``; without Triton the function itself, which can be named but not run."""
    return function if triton is None else triton.jit(function)


def blocks(elements: int, block: int) -> int:
    """How many blocks hold so many elements."""
    return -(-elements // block)


def warps(block: int) -> int:
    """Warps of a program that holds so many elements of a row at once: 4 to 16, 16 elements a thread."""
    return min(16, max(4, block // 512))


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n`` >= 1: Triton's tiles ask for it."""
    return 1 << (n - 1).bit_length()
