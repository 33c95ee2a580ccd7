"""The passes over a shard of the vocabulary behind ``distillation.py``: C++ on a CPU, Triton on a GPU.

The formulas in plain PyTorch beside them are used for other dtypes, and where neither is there.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels import fused, launch
from megatron_ext.kernels.cross_entropy import _columns, _padding, cross_entropy_stats_reference
from megatron_ext.kernels.fused import _is_bf16, _kernels


def supports(logits: Tensor, teacher: Tensor | None) -> bool:
    """Whether the C++ kernel can take these, which may have two formats."""
    return fused.supports(logits) and (teacher is None or fused.supports(teacher))


def shard_stats(
    logits: Tensor, target: Tensor, teacher: Tensor | None, temperature: float, first: int, width: int
) -> tuple[Tensor, ...]:
    """Seven numbers of each row, in one pass over logits [rows, v] and the teacher's.

    They are the first fields of ``distillation.Stats``, the last three of them 0 without a teacher; float32,
    or float64 for float64 logits.
    """
    if launch.supports(logits, *([] if teacher is None else [teacher])):
        from megatron_ext.kernels import triton_distillation

        return triton_distillation.stats(logits, target, teacher, temperature, first, width)
    if not supports(logits, teacher):
        return _stats_reference(logits, target, teacher, temperature, first, width)
    rows, columns = logits.shape
    stats = torch.zeros(7, rows, dtype=torch.float32)
    _kernels.distillation_stats(
        *_addresses(logits, target, teacher, first, temperature, stats), rows, width, columns, _threads()
    )
    return tuple(stats)


def _stats_reference(
    logits: Tensor, target: Tensor, teacher: Tensor | None, temperature: float, first: int, width: int
) -> tuple[Tensor, ...]:
    top, total, chosen = cross_entropy_stats_reference(logits, target, first, width)
    padding = _padding(logits, width)
    x = (logits.to(top.dtype) - top.masked_fill(top == -torch.inf, 0.0)[:, None]) / temperature
    soft = x.exp().masked_fill(padding, 0.0).sum(-1)
    if teacher is None:
        return top, total, chosen, soft, *torch.zeros(3, len(top), dtype=top.dtype, device=top.device)
    u = teacher.to(top.dtype).masked_fill(padding, -torch.inf)
    best = u.amax(-1)
    d = (u - best.masked_fill(best == -torch.inf, 0.0)[:, None]) / temperature
    e = d.exp()
    cross = torch.where(e == 0, 0.0, e * (d - x))
    return top, total, chosen, soft, best, e.sum(-1), cross.sum(-1)


def shard_grad_(
    logits: Tensor,
    target: Tensor,
    teacher: Tensor | None,
    temperature: float,
    first: int,
    row: Tensor,
    width: int,
) -> Tensor:
    """Overwrites logits l [rows, v] with a gradient, one pass; returns them.

    It is hard exp(x) + soft exp(x / T) - pull exp((u - teacher_top) / T) with x = l - top and the teacher's
    logits u, minus ``chosen`` at the target, and 0 from column ``width`` on. ``row`` [6, rows] holds top,
    teacher_top, hard, soft, pull and chosen of each row.
    """
    rows, columns = logits.shape
    if launch.supports(logits, *([] if teacher is None else [teacher])):
        from megatron_ext.kernels import triton_distillation

        torch.autograd.graph.increment_version(logits)
        return triton_distillation.grad_(logits, target, teacher, temperature, first, row, width)
    if not supports(logits, teacher):
        return _grad_reference_(logits, target, teacher, temperature, first, row, width)
    row = row.contiguous()
    torch.autograd.graph.increment_version(logits)  # written behind autograd's back
    _kernels.distillation_grad(
        *_addresses(logits, target, teacher, first, temperature, row), rows, width, columns, _threads()
    )
    return logits


def _grad_reference_(
    logits: Tensor,
    target: Tensor,
    teacher: Tensor | None,
    temperature: float,
    first: int,
    row: Tensor,
    width: int,
) -> Tensor:
    top, teacher_top, hard, soft, pull, chosen = (values[:, None] for values in row)
    x = logits.to(top.dtype) - top
    gradient = x.exp() * hard + (x / temperature).exp() * soft
    if teacher is not None:
        gradient -= ((teacher.to(top.dtype) - teacher_top) / temperature).exp() * pull
    column, ours = _columns(logits, target, first)
    gradient[torch.arange(len(x), device=x.device), column] -= chosen[:, 0] * ours
    return logits.copy_(gradient.masked_fill_(_padding(logits, width), 0.0))


def _addresses(
    logits: Tensor, target: Tensor, teacher: Tensor | None, first: int, temperature: float, table: Tensor
) -> tuple[Any, ...]:
    bf16, address = (False, 0) if teacher is None else (_is_bf16(teacher), teacher.data_ptr())
    where = logits.data_ptr(), target.data_ptr(), first
    return _is_bf16(logits), *where, bf16, address, 1.0 / temperature, table.data_ptr()


def _threads() -> int:
    return torch.get_num_threads()
