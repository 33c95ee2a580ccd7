"""AdamW, gradient norm and scaling over lists of tensors on the CPU, each one pass over memory.

Every function falls back to plain PyTorch where the C++ kernels cannot take a tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ext.models import fused
from megatron_ext.models.fused import _kernels


def _by_kernel(*lists: Sequence[Tensor]) -> bool:
    return all(
        fused.takes(*tensors) and all(t.is_contiguous() for t in tensors) for tensors in lists if tensors
    )


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [t.numel() for t in tensors]


def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] = (),
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """:func:`adamw_` in plain PyTorch."""
    correction1, correction2 = (1.0 - beta**step for beta in betas)
    for i, (p, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = grad.to(p.dtype) * grad_scale
        m.lerp_(g, 1.0 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1.0 - betas[1])
        denominator = v.sqrt().div_(correction2**0.5).add_(eps)
        p.mul_(1.0 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / correction1)
        if copies:
            copies[i].copy_(p)


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] = (),
    **options: Any,
) -> None:
    """One AdamW step in place (decoupled weight decay), as torch.optim.AdamW and Apex's FusedAdam.

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
    p = p (1 - lr wd) - lr m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + eps).

    Args:
        params, exp_avgs, exp_avg_sqs: float32, contiguous.
        grads: float32 or bfloat16, shaped as ``params``.
        copies: bfloat16 model parameters that receive the new ``params``; empty for none.
        step: from 1; options: lr, betas, eps, weight_decay, and grad_scale, by which gradients are
            multiplied first (the clip factor; saves a pass over them).
    """
    tensors = (params, grads, exp_avgs, exp_avg_sqs, copies)
    wide = all(t.dtype == torch.float32 for group in (params, exp_avgs, exp_avg_sqs) for t in group)
    narrow = all(t.dtype == torch.bfloat16 for t in copies)
    if not params:
        return
    if not (wide and narrow and _by_kernel(*tensors)):
        adamw_reference(*tensors, **options)
        return
    _check(*tensors)
    _kernels.adamw(
        grads[0].dtype == torch.bfloat16,
        *(_addresses(group) for group in tensors),
        _sizes(params),
        options["step"],
        options["lr"],
        *options["betas"],
        options["eps"],
        options["weight_decay"],
        options.get("grad_scale", 1.0),
        torch.get_num_threads(),
    )
    for t in (*params, *exp_avgs, *exp_avg_sqs, *copies):
        torch.autograd.graph.increment_version(t)


def _check(params: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    for group in others:
        if group and _sizes(group) != _sizes(params):
            raise ValueError("adamw_: every list must hold tensors of the sizes of `params`")


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """Sum of the squares of all elements, in float64, the same for any number of threads."""
    if not tensors:
        return 0.0
    if not _by_kernel(tensors):
        return sum(float(t.detach().double().square().sum()) for t in tensors)
    bf16 = tensors[0].dtype == torch.bfloat16
    return _kernels.sum_of_squares(bf16, _addresses(tensors), _sizes(tensors), torch.get_num_threads())


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply every tensor by ``factor`` in place."""
    if not tensors:
        return
    if not _by_kernel(tensors):
        torch._foreach_mul_(list(tensors), factor)
        return
    bf16 = tensors[0].dtype == torch.bfloat16
    _kernels.scale(bf16, _addresses(tensors), _sizes(tensors), factor, torch.get_num_threads())
    for t in tensors:
        torch.autograd.graph.increment_version(t)


def multi_tensor_l2_norm(chunk_size, overflow_buffer, tensor_lists, per_parameter, *args):
    """L2 norm over all tensors of ``tensor_lists[0]``; the signature of Apex's multi_tensor_l2norm.

    torch's fp32 norm of a tensor of four million elements on a CPU is up to 4.5e-4 too small, and
    this norm feeds the factor by which every gradient is clipped.

    Stands for megatron.core.utils.local_multi_tensor_l2_norm on a CPU, used by clip_grads.py.
    """
    total = torch.tensor([sum_of_squares(tensor_lists[0])], dtype=torch.float64).sqrt().float()
    return total, None


def multi_tensor_scale(chunk_size, overflow_buffer, tensor_lists, scale):
    """destination = source * scale for two lists of tensors; the signature of Apex's multi_tensor_scale.

    Stands for megatron.core.utils.local_multi_tensor_scale on a CPU, used by clip_grads.py with one
    list as both.
    """
    sources, destinations = tensor_lists
    if sources is not destinations:
        for source, destination in zip(sources, destinations, strict=True):
            destination.copy_(source)
    scale_(destinations, float(scale))
