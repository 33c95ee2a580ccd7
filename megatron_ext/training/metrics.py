"""The peak speed of this machine, and the norm of the parameters."""

import time
from functools import cache

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_ext import platform
from megatron_ext.kernels.multi_tensor import sum_of_squares
from megatron_ext.planning.speed import data_sheet_flops


@cache
def peak_flops(dtype: torch.dtype) -> float:
    """Peak floating point operations per second: from the data sheet of a known GPU, otherwise measured."""
    known = None
    if platform.on_gpu():
        known = data_sheet_flops(platform.device_name(), dtype in (torch.bfloat16, torch.float16))
    return known or measured_flops(dtype)


def measured_flops(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure the peak as the best of repeated matrix products, on a CPU with the threads of this process.

    The matrices are random: with constant values a GPU sustains a clock that real data does not allow. They
    have a generator of their own: the device's is the dropout's, and only one rank measures.
    """
    n, device = 8192 if platform.on_gpu() else 1024, platform.current_device()
    own = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=own, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        platform.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def params_norm(model: list[torch.nn.Module]) -> float:
    """L2 norm of all parameters, each counted once (``--log-params-norm``); a collective call."""
    squares = sum(
        sum_of_squares([parameter])
        for chunk in model
        for parameter in chunk.parameters()
        if param_is_not_tensor_parallel_duplicate(parameter) and param_is_not_shared(parameter)
    )
    total = torch.tensor([squares], dtype=torch.float64, device=platform.current_device())
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return total.sqrt().item()
