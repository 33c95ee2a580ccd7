"""The Triton kernels compiled for GPUs that need not be there: they compile, and their accesses are wide."""

import re

import pytest
import torch

from megatron_ext.kernels import (
    triton_activation,
    triton_cross_entropy,
    triton_distillation,
    triton_language,
    triton_norm,
    triton_rope,
)
from tests.gpu.interpreted import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not triton_language.available(), reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]
#: Loads and stores of single numbers: a row's statistics or target, few channels of the angles' tables. The
#: others take 8 or 16 bytes a thread.
NARROW = {
    "_stats_kernel": 5,
    "_grad_kernel": 4,
    "_both_stats_kernel": 9,
    "_both_grad_kernel": 7,
    "_norm_forward_kernel": 1,
    "_norm_backward_kernel": 1,
    "_rotate_kernel": 4,
}
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)


def series_activation():
    triton_activation.series_swiglu(half(64, 2 * 6912), half(2, 6912), half(2, 6912)).sum().backward()


def rope():
    parts = triton_rope.split_and_rotate(half(16, 4, 16, 3 * 128), 1, 128, torch.zeros(16, 1, 1, 128))
    sum(part.sum() for part in parts).backward()


def grouped_rope_of_half_the_channels():
    parts = triton_rope.split_and_rotate(half(16, 4, 4, 6 * 128), 4, 128, torch.zeros(16, 1, 1, 64))
    sum(part.sum() for part in parts).backward()


def cross_entropy():
    logits, target = half(64, 48000).detach(), torch.zeros(64, dtype=torch.int64)
    top, total, _ = triton_cross_entropy.cross_entropy_stats(logits, target, 0, 47984)
    triton_cross_entropy.cross_entropy_grad_(logits, target, 0, top, total, torch.ones(64), 47984)


def distillation():
    logits, teacher = half(64, 48000).detach(), torch.zeros(64, 48000)
    target = torch.zeros(64, dtype=torch.int64)
    for given in (teacher, None):
        triton_distillation.stats(logits, target, given, 2.0, 0, 47984)
        triton_distillation.grad_(logits, target, given, 2.0, 0, torch.ones(6, 64), 47984)


def norm():
    triton_norm.rms_norm(half(64, 2048), half(2048), 1e-5).sum().backward()


def ptx_of(kernel, arguments: tuple, constants: dict, capability: int) -> str:
    """Compile as a launch with these arguments would: what is known of them is that they divide by 16."""
    import triton
    from triton.backends.compiler import GPUTarget

    warps = constants.pop("num_warps", 4)
    signature, fixed, divisible = {}, dict(constants), {}
    for position, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            fixed[name] = 1
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            divisible[(position,)] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constexprs=fixed, attrs=divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return compiled.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "run", [series_activation, rope, grouped_rope_of_half_the_channels, cross_entropy, distillation, norm]
)
def test_compiles_with_wide_accesses(run, capability, monkeypatch):
    names = set()

    def compile_only(kernel, grid, arguments, reads, writes, **constants):
        ptx = ptx_of(kernel, arguments, constants, capability)
        accesses = re.findall(r"\b(?:ld|st)\.global[.\w:]*", ptx)
        narrow = [access for access in accesses if not access.endswith((".v2.b32", ".v4.b32"))]
        assert len(narrow) <= NARROW.get(kernel.__name__, 0), (kernel.__name__, narrow)
        assert len(accesses) > len(narrow) and ".local" not in ptx
        names.add(kernel.__name__)

    modules = triton_activation, triton_rope, triton_cross_entropy, triton_distillation, triton_norm
    for module in modules:
        monkeypatch.setattr(module, "launch", compile_only)
    run()
    assert names
