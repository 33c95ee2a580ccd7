"""The fp32 products of Megatron-Core's linear layers on a CPU, each by what does it fastest.

torch multiplies fp32 matrices with MKL, unless asked for oneDNN, which is the faster for a linear
layer's output and for the gradient of its input (by 10 to 20 % on AMD processors, docs/kernels.md).
The gradient of the weight is added in place, by a kernel of our own: its operands come from memory,
and it asks for them ahead.
"""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_ext.kernels import fused
from megatron_ext.kernels.fused import _kernels

#: Arguments that later versions of Megatron-Core add, with the values that change nothing.
_NEUTRAL = {"gtp_remat_size": 1}
#: Columns of a weight that the kernel takes at a time, at most, in any instruction set.
_COLUMNS_UNIT = 32


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T. x: [..., in], weight: [out, in] of any strides, both fp32 on the CPU -> [..., out]."""
    if hasattr(torch.ops.mkldnn, "_linear_pointwise") and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.matmul(x, weight.t())


def add_product_(total: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """total += grad^T x. total: [out, in], grad: [rows, out], x: [rows, in], fp32; returns total.

    The sum over the rows does not depend on the number of threads.
    """
    known = total.is_contiguous() and fused.supports(total, grad, x) and total.dtype == torch.float32
    if not known or x.size(1) % _COLUMNS_UNIT:
        return total.addmm_(grad.t(), x)
    grad, x = grad.detach().contiguous(), x.detach().contiguous()
    addresses = (t.data_ptr() for t in (grad, x, total))
    _kernels.weight_gradient(*addresses, *grad.shape, x.size(1), torch.get_num_threads())
    torch.autograd.graph.increment_version(total)  # written behind autograd's back
    return total


class _Linear(torch.autograd.Function):
    """x w^T + b; the weight's gradient is added to ``weight.main_grad`` if ``in_place``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_place: bool,
        reduce: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.reduce, ctx.group = bias is not None, reduce, group
        ctx.parameter = weight if in_place else None  # a saved tensor may come back as another object
        out = product(x.detach(), weight.detach())
        return out if bias is None else out + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        x_grad = product(grad, weight.t())
        # The all-reduce runs beside the product below.
        pending = dist.all_reduce(x_grad, group=ctx.group, async_op=True) if ctx.reduce else None
        weight_grad = _weight_gradient(grad.flatten(0, -2), x.flatten(0, -2), ctx.parameter)
        bias_grad = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
        if pending is not None:
            pending.wait()
        return x_grad, weight_grad, bias_grad, None, None, None


def _weight_gradient(grad: Tensor, x: Tensor, parameter: nn.Parameter | None) -> Tensor:
    """grad^T x; with a parameter it is added to its ``main_grad``, and what is returned has no values."""
    if parameter is None:
        return grad.t() @ x
    add_product_(parameter.main_grad, grad, x)
    parameter.grad_added_to_main_grad = True
    return torch.empty_like(parameter)  # Megatron-Core's hook looks whether a gradient arrived


def _forward_impl(
    layer: nn.Module,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: list[Tensor] | None,
    wgrad_deferral_limit: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    **later: Any,
) -> Tensor:
    """Stands in for the method of that name of Megatron-Core's two linear layers, where it can."""
    plain = not sequence_parallel and grad_output_buffer is None and weight.requires_grad
    plain = plain and later.items() <= _NEUTRAL.items()
    if not (plain and weight.dtype == torch.float32 and fused.supports(input, weight)):
        options = dict(grad_output_buffer=grad_output_buffer, wgrad_deferral_limit=wgrad_deferral_limit)
        return type(layer)._forward_impl(
            layer, input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel,
            tp_group=tp_group, **options, **later,
        )  # fmt: skip
    main_grad = getattr(weight, "main_grad", None)
    in_place = (
        gradient_accumulation_fusion
        and main_grad is not None
        and main_grad.dtype == torch.float32
        and not getattr(weight, "zero_out_wgrad", False)
    )
    reduce = allreduce_dgrad and tp_group is not None and tp_group.size() > 1
    return _Linear.apply(input, weight, bias, in_place, reduce, tp_group)


def speed_up(model: nn.Module) -> None:
    """Let the linear layers of ``model``, whoever built them, multiply as this module does."""
    for layer in model.modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            layer._forward_impl = MethodType(_forward_impl, layer)
