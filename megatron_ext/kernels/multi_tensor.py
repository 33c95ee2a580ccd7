"""Gradient norm and scaling over lists of tensors, each one pass over memory.

Every function falls back to plain PyTorch where the C++ kernels cannot take a tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.kernels import fused
from megatron_ext.kernels.fused import _kernels


def _by_kernel(*lists: Sequence[Tensor]) -> bool:
    return all(
        fused.supports(*tensors) and all(t.is_contiguous() for t in tensors) for tensors in lists if tensors
    )


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [t.numel() for t in tensors]


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """Sum of the squares of all elements, in float64, the same for any number of threads."""
    if not tensors:
        return 0.0
    if not _by_kernel(tensors):
        return sum(_sum_of_squares_in_blocks(t) for t in tensors)
    bf16 = tensors[0].dtype == torch.bfloat16
    return _kernels.sum_of_squares(bf16, _addresses(tensors), _sizes(tensors), torch.get_num_threads())


def _sum_of_squares_in_blocks(tensor: Tensor) -> float:
    """Blocks of a MiB are widened at a time, so that no float64 copy of a whole gradient is ever made."""
    blocks = (block.double() for block in tensor.detach().reshape(-1).split(1 << 18))
    return sum(torch.dot(block, block).item() for block in blocks)


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


def multi_tensor_l2_norm(
    chunk_size: int,
    overflow_buffer: Tensor,
    tensor_lists: list[list[Tensor]],
    per_parameter: bool,
    *args: object,
) -> tuple[Tensor, None]:
    """L2 norm over all tensors of ``tensor_lists[0]``; the signature of Apex's multi_tensor_l2norm.

    torch's fp32 norm of a tensor of four million elements on a CPU is up to 4.5e-4 too small, and
    this norm feeds the factor by which every gradient is clipped.

    Stands for megatron.core.utils.local_multi_tensor_l2_norm on a CPU, used by clip_grads.py.
    """
    total = torch.tensor([sum_of_squares(tensor_lists[0])], dtype=torch.float64).sqrt().float()
    return total, None


def multi_tensor_scale(
    chunk_size: int, overflow_buffer: Tensor, tensor_lists: list[list[Tensor]], scale: float | Tensor
) -> None:
    """destination = source * scale for two lists of tensors; the signature of Apex's multi_tensor_scale.

    Stands for megatron.core.utils.local_multi_tensor_scale on a CPU, used by clip_grads.py with one
    list as both.
    """
    sources, destinations = tensor_lists
    if sources is not destinations:
        for source, destination in zip(sources, destinations, strict=True):
            destination.copy_(source)
    scale_(destinations, float(scale))


def foreach_l2_norm(
    chunk_size: int,
    overflow_buffer: Tensor,
    tensor_lists: list[list[Tensor]],
    per_parameter: bool,
    *args: object,
) -> tuple[Tensor, None]:
    """:func:`multi_tensor_l2_norm` on a GPU, which nobody waits for: torch's kernel over lists.

    megatron.core.utils.local_multi_tensor_l2_norm reads the norm of every tensor back to the host.
    """
    norms = torch._foreach_norm(tensor_lists[0], 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def foreach_scale(
    chunk_size: int, overflow_buffer: Tensor, tensor_lists: list[list[Tensor]], scale: float | Tensor
) -> None:
    """:func:`multi_tensor_scale` on a GPU: in place, where upstream's makes a copy of every gradient."""
    sources, destinations = tensor_lists
    if sources is not destinations:
        torch._foreach_copy_(destinations, sources)
    torch._foreach_mul_(destinations, scale)


def provide_multi_tensor() -> None:
    """Let Megatron-Core clip by these on a GPU that has neither Transformer Engine nor Apex.

    Serves optimizer/clip_grads.py 35-46, which takes the functions of utils.py 1200-1215 then.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = foreach_l2_norm, foreach_scale
