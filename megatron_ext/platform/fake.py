"""Runs one rank of a large job without the other ranks, without allocating memory and without a GPU.

The process group is torch's fake one: a collective returns at once and changes nothing. Tensors are fake too:
they have a shape, a dtype and a storage size, but no values. Autograd, Megatron-Core's schedules and the
optimizer run unchanged, so FLOPs and memory can be counted.

A torch without CUDA has no fake CUDA tensors: these tensors report a CPU, and where that would change the
computation, the operators of a GPU are substituted (``act_as_gpu``). This is for a process that does nothing
else: ``join`` and ``act_as_gpu`` change torch for the rest of the process.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext.kernels import fused, launch, weight_gradient

aten = torch.ops.aten


def join(rank: int, world_size: int) -> None:
    """Join a job of ``world_size`` processes, of which only this one exists."""
    distributed = torch.distributed
    new_group = distributed.new_group
    # Megatron-Core also creates gloo groups; here all groups are fake.
    distributed.new_group = lambda *args, **kwargs: new_group(*args, **kwargs | {"backend": "fake"})
    distributed.all_gather_object = _all_gather_own
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def _all_gather_own(objects: list[Any], own: object, group: Any = None) -> None:
    """all_gather_object as if every rank had the same object."""
    objects[:] = [own] * len(objects)


def act_as_gpu() -> None:
    """Compute on this process's CPU tensors with the operators that torch uses on CUDA."""
    fused._kernels = None
    vars(weight_gradient)["adds_in_fp32"] = lambda dtype, device: True
    F.rms_norm = lambda x, shape, weight, eps: _RMSNorm.apply(x, weight)
    F.scaled_dot_product_attention = _attention


class _RMSNorm(torch.autograd.Function):
    """torch's fused RMSNorm (2.9 and later), which saves its inputs and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
    dropout_p: float = 0.0,
) -> Tensor:
    """[b, np, s, hn], twice [b, ng, t, hn] -> [b, np, s, hn]; torch's kernels for half precision on CUDA."""
    if attn_mask is None:
        attend = aten._scaled_dot_product_flash_attention
        return attend(query, key, value, dropout_p, is_causal, scale=scale)[0]
    shared = query.size(1) // key.size(1)
    key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    attend = aten._scaled_dot_product_efficient_attention
    bias = attn_mask.expand(query.size(0), query.size(1), -1, -1)
    return attend(query, key, value, bias, True, dropout_p, False, scale=scale)[0]


@contextlib.contextmanager
def tensors(triton: bool) -> Iterator["Memory"]:
    """Inside the context new tensors are fake, and ``triton`` kernels are selected, but not launched.

    Yields the memory counter of the tensors.
    """
    # nn.Module.to tries to swap fake parameters, which fails.
    torch.utils.swap_tensors = lambda old, new: setattr(old, "data", new.data)
    chosen = launch.observed(lambda _: False) if triton else contextlib.nullcontext()
    # The states of generators are real: they are created before, and compared.
    with chosen, FakeTensorMode(allow_non_fake_inputs=True), Memory() as memory, _Answers():
        yield memory


class Memory(TorchDispatchMode):
    """Bytes of all live storages: ``now``, and the maximum (``peak``) since ``reset_peak``.

    Counted like a GPU's allocator (``torch.cuda.memory_allocated``), in whole blocks of 512 bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def reset_peak(self) -> None:
        """Set the peak to the current value."""
        self.peak = self.now

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = -(-storage.nbytes() // 512) * 512
            self.now += self._sizes[storage._cdata]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, address: int) -> None:
        self.now -= self._sizes.pop(address)


class _Answers(TorchDispatchMode):
    """Operators that fake tensors lack: values are 0, conditions are true, collectives return at once."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is aten._local_scalar_dense.default and args[0].constant is None:
            dtype = args[0].dtype
            return 0.0 if dtype.is_floating_point else dtype == torch.bool or 0
        if function.namespace == "c10d" and "coalesced" in function._schema.name:
            return FakeWork().boxed()
        return function(*args, **kwargs or {})


def counted_flops(window: int | None) -> FlopCounterMode:
    """torch's FLOP counter, with causal attention counted as half of the square, and twice that backward.

    Attention with a mask is counted as that of ``window``. torch counts the whole square, and the scores that
    a flash kernel recomputes.
    """

    def attention(query: torch.Size, key: torch.Size, *rest: Any, **options: Any) -> int:
        batch, heads, length, width = query
        return 2 * batch * heads * length * key[2] * width

    def backward(grad: torch.Size, query: torch.Size, key: torch.Size, *rest: Any, **options: Any) -> int:
        return 2 * attention(query, key)

    def windowed(query: torch.Size, key: torch.Size, *rest: Any, **options: Any) -> int:
        batch, heads, length, width = query
        seen = min((window or 0) + 1, length)
        return 2 * batch * heads * width * (2 * length - seen) * seen

    def windowed_backward(
        grad: torch.Size, query: torch.Size, key: torch.Size, *rest: Any, **more: Any
    ) -> int:
        return 2 * windowed(query, key)

    def product(total: torch.Size, a: torch.Size, b: torch.Size, *rest: Any, **options: Any) -> int:
        return 2 * a[0] * a[1] * b[1]  # torch's own formula supports neither addmm_ nor out_dtype

    mapping = {
        aten._scaled_dot_product_flash_attention: attention,
        aten._scaled_dot_product_flash_attention_backward: backward,
        aten._scaled_dot_product_efficient_attention: windowed,
        aten._scaled_dot_product_efficient_attention_backward: windowed_backward,
        aten.addmm: product,
        aten.addmm_: product,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(contextlib.nullcontext[None]):
    """Replaces torch's ModuleTracker, whose hooks keep the inputs of modules alive."""

    parents = {"Global"}
