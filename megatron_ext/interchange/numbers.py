"""Tensors in another number format, where that keeps what they say."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.interchange.errors import InterchangeError

#: The formats that a flag can name.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Share of a tensor's norm that rounding may take; bf16, the coarsest format, takes 0.2 % of a number.
_MOST_LOST = 0.01
_BLOCK = 1 << 24


def to_format(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as ``dtype``.

    Raises:
        InterchangeError: a number would become Inf, or small ones would be rounded away.
    """
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    largest, kind = tensor.abs().max().item(), str(dtype).removeprefix("torch.")
    if not torch.isfinite(torch.stack(torch.aminmax(converted))).all():
        raise InterchangeError(
            f"{name} does not fit {kind}: its largest value is {largest:g}, {kind} ends at "
            f"{torch.finfo(dtype).max:g}; choose another --dtype"
        )
    lost, whole = _norms(tensor, converted)
    if lost > _MOST_LOST * whole:
        raise InterchangeError(
            f"{name} is too small for {kind}: {lost / whole:.0%} of it is rounded away, its largest value is "
            f"{largest:g}; choose another --dtype"
        )
    return converted


def _norms(tensor: Tensor, converted: Tensor) -> tuple[float, float]:
    """The norms of the difference and of ``tensor``, in blocks to save memory."""
    lost = whole = 0.0
    for before, after in zip(tensor.flatten().split(_BLOCK), converted.flatten().split(_BLOCK), strict=True):
        exact = before.double()
        lost += (after.double() - exact).square().sum().item()
        whole += exact.square().sum().item()
    return lost**0.5, whole**0.5
