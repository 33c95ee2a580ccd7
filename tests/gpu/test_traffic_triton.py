"""What a kernel's launch says that it reads and writes, against the loads and stores of the interpreter."""

from collections import Counter

import pytest
import torch

from megatron_ext.kernels import (
    launch,
    triton_activation,
    triton_cross_entropy,
    triton_distillation,
    triton_norm,
    triton_rope,
)
from tests.gpu.interpreted import INTERPRETED, needs_triton

#: Cross entropy reads the logits of its targets a second time.
READ_TWICE = 3
pytestmark = [*needs_triton, pytest.mark.skipif(not INTERPRETED, reason="a GPU does not show its loads")]


def series_activation():
    x = torch.randn(70, 2 * 30, requires_grad=True)
    parameters = [torch.randn(3, 30, requires_grad=True) for _ in range(2)]
    triton_activation.series_swiglu(x, *parameters).sum().backward()


def rope():
    freqs = torch.randn(3, 1, 1, 8)
    triton_rope.apply_rope(torch.randn(3, 2, 5, 12, requires_grad=True)[..., 1:], freqs).sum().backward()
    triton_rope.apply_rope(torch.randn(3, 2, 5, 12), freqs, inplace=True)


def split_and_rotate():
    qkv = torch.randn(3, 2, 2, 5 * 12, dtype=torch.bfloat16, requires_grad=True)
    parts = triton_rope.split_and_rotate(qkv, 3, 12, torch.randn(3, 1, 1, 12))
    sum(part.float().square().sum() for part in parts).backward()


def cross_entropy():
    logits, target = torch.randn(3, 5000, dtype=torch.bfloat16), torch.tensor([1000, 7, 6100])
    top, total, _ = triton_cross_entropy.cross_entropy_stats(logits, target, 1000, 4900)
    triton_cross_entropy.cross_entropy_grad_(logits, target, 1000, top, total, torch.ones(3), 4900)


def distillation():
    logits, teacher = torch.randn(3, 5000, dtype=torch.bfloat16), torch.randn(3, 5000)
    target = torch.tensor([1000, 7, 6100])
    for given in (teacher, None):
        triton_distillation.stats(logits, target, given, 2.0, 1000, 4900)
        triton_distillation.grad_(logits, target, given, 2.0, 1000, torch.ones(6, 3), 4900)


def norm():
    x, weight = torch.randn(40, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    triton_norm.rms_norm(x, weight, 1e-5).sum().backward()


def addresses(t: torch.Tensor) -> list[int]:
    """Of every element of a view."""
    at = torch.full((), t.data_ptr())
    for dim, (n, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        at = at.unsqueeze(dim) + torch.arange(n) * stride * t.element_size()
    return at.flatten().tolist()


@pytest.fixture
def touched(monkeypatch):
    """The addresses of the elements loaded and stored since the last look."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen: dict[str, list[int]] = {"load": [], "store": []}

    def watched(name: str):
        method = getattr(InterpreterBuilder, f"create_masked_{name}")

        def watch(self, pointers, *args):
            mask = args[0] if name == "load" else args[1]
            seen[name] += pointers.data[mask.data.astype(bool)].ravel().tolist()
            return method(self, pointers, *args)

        monkeypatch.setattr(InterpreterBuilder, f"create_masked_{name}", watch)

    watched("load")
    watched("store")
    return seen


@pytest.mark.parametrize(
    "run", [norm, series_activation, rope, split_and_rotate, cross_entropy, distillation]
)
def test_a_launch_names_what_its_kernel_touches(run, touched, monkeypatch):
    """Every element that is named is touched, and no other; of the largest tensors each element once."""
    started: list[tuple] = []
    real = launch.launch

    def check(kernel, grid, arguments, reads, writes, **constants):
        touched["load"], touched["store"] = [], []
        real(kernel, grid, arguments, reads, writes, **constants)
        started.append(kernel.__name__)
        for named, found in ((reads, touched["load"]), (writes, touched["store"])):
            elements = [set(addresses(t)) for t in named]
            assert set().union(*elements) == set(found)
            times = Counter(found)
            assert sum(times[address] > 1 for address in max(elements, key=len)) <= READ_TWICE

    modules = triton_activation, triton_rope, triton_cross_entropy, triton_distillation, triton_norm
    for module in modules:
        monkeypatch.setattr(module, "launch", check)
    run()
    assert len(started) >= 2
