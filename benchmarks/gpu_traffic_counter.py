"""The counting behind gpu_traffic.py: a model of fake tensors, run under a mode that sees every operator."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state, utils
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as mcore_optimizer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.arguments.parser import read_args
from megatron_ext.arguments.vocabulary import padded_vocab_size
from megatron_ext.kernels import fused, launch, multi_tensor, weight_gradient
from megatron_ext.kernels.launch import Launch
from megatron_ext.models.builder import build_model, ddp_config, unwrap, wrap_for_training
from megatron_ext.models.config import transformer_config
from megatron_ext.training import adam, distributed, step
from megatron_ext.training.loop import connect
from megatron_ext.training.optimizer import build_optimizer, optimizer_config
from megatron_ext.training.schedule import build_scheduler

VOCABULARY = 48000
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
#: Operators that move nothing, besides views.
_FREE = {"_unsafe_view", "detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"}
#: Operators that do not read the tensor they are given for its shape or to be overwritten.
_FIRST_UNREAD = {"copy_", "fill_", "zero_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_full"}
#: Operators that touch as many elements of their first tensor as of their result or, in place, of their last.
_INDEXED = {"embedding", "index", "gather", "index_select", "index_put_"}
#: Parts by the class of the module whose forward makes them.
_PARTS = {
    "RMSNorm": "norms",
    "SeriesActivation": "series activation",
    "AugmentedShortcut": "shortcut",
    "AugmentedSelfAttention": "rotary embedding",
    "ScaledDotProductAttention": "around attention",
    "ColumnParallelLinear": "linear layers",
    "RowParallelLinear": "linear layers",
    "VocabParallelEmbedding": "embedding",
    "RotaryEmbedding": "embedding",
}
#: The step's parts; the others belong to forward and backward.
OPTIMIZER = ("NaN check", "gradient norm", "clipping", "Adam", "copies and zeros")
#: Which parts run in Triton; the norm and the sums of gradients are chosen in _with_kernels.
_TRITON = {
    "plain": (),
    "before": ("series activation",),
    "now": ("series activation", "rotary embedding", "cross entropy"),
}


def size_of(t: Tensor) -> int:
    """Bytes of the elements that lie apart in memory: what is expanded counts once."""
    return math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) * t.element_size()


def moved(func, args: tuple, kwargs: dict, result: object) -> int:
    """Bytes that an ATen operator reads and writes."""
    name = func.overloadpacket.__name__
    returns = func._schema.returns
    if name in _FREE or any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
        return 0
    outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    given = [
        (a, kwargs.get(a.name, args[i] if i < len(args) else None))
        for i, a in enumerate(func._schema.arguments)
    ]
    tensors = [[t for t in tree_leaves(value) if isinstance(t, Tensor)] for a, value in given if not a.is_out]
    inputs = [t for group in tensors[name in _FIRST_UNREAD :] for t in group]
    if not outputs:  # in place on a list, or nothing returned
        changed = [i for i, (a, _) in enumerate(given) if a.alias_info is not None and a.alias_info.is_write]
        if name.startswith("_fused_adam") and kwargs.get("grad_scale") is None:
            changed.remove(1)  # the gradients
        outputs = [t for i in changed for t in tensors[i]]
    if name in _INDEXED:
        indices_and_more = sum(map(size_of, inputs[1:]))
        touched = inputs[-1] if name.endswith("_") else outputs[0]
        return indices_and_more + (2 - name.endswith("_")) * size_of(touched)
    return sum(map(size_of, inputs)) + sum(map(size_of, outputs))


class Counting(TorchDispatchMode):
    """Counts operators and bytes by part of the model; waits for the GPU give 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ["copies and zeros"]
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.ranges: list[tuple[int, int, str]] = []  # of autograd's sequence numbers, inner before outer
        self.counts: Counter = Counter()  # (part, operator) -> number
        self.bytes: Counter = Counter()
        self.syncs = 0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is called within it, and its gradients, belong to ``name``."""
        begin = torch.autograd._get_sequence_nr()
        self.stack.append(name)
        try:
            yield
        finally:
            self.stack.pop()
            self.ranges.append((begin, torch.autograd._get_sequence_nr(), name))

    def here(self) -> str:
        """The part that is at work: of the forward, or of the node whose backward this is."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self.stack[-1]
        if "AccumulateGrad" in node.name():
            return "weight gradients"
        number = node._sequence_nr()
        return next((name for begin, end, name in self.ranges if begin <= number < end), "residuals")

    def add(self, part: str, operator: str, size: int) -> None:
        self.counts[part, operator] += 1
        self.bytes[part, operator] += size

    def launched(self, started: Launch) -> bool:
        """The observer of launches: counts, and starts nothing."""
        self.add(self.here(), started.kernel, sum(map(size_of, [*started.reads, *started.writes])))
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func is torch.ops.aten._local_scalar_dense.default:
            self.syncs += 1
            return 1.0
        result = func(*args, **kwargs)
        size = moved(func, args, kwargs, result) if func.namespace == "aten" else 0
        if size:
            product = name in _PRODUCTS
            part = "products" if product else "attention" if "scaled_dot_product" in name else self.here()
            # The gradients of what is used twice are summed: the residual stream's, and what a norm gives.
            backward = torch._C._current_autograd_node() is not None
            summed = backward and name.startswith("add") and part in ("norms", "linear layers")
            self.add("residuals" if summed else part, name, size)
        return result


class TorchRMSNorm(torch.autograd.Function):
    """torch's fused kernels (2.9 and later): its backward reads x and dy twice, for dx and for dw."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        launch._observer(Launch("_fused_rms_norm", (x, weight), (y, rstd)))
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        launch._observer(Launch("_fused_rms_norm_backward", (dy, x, rstd, dy, x, rstd, weight), (dx, dw)))
        return dx, dw, None


def upstream_norm(chunk_size, overflow_buffer, tensor_lists, *args):
    """Megatron-Core's norm without Apex (utils.py 1205-1207): torch.tensor reads each number back."""
    norms = [torch.norm(tensor).item() for tensor in tensor_lists[0]]
    return torch.norm(torch.tensor(norms)).view(1), None


def count_step(variant: str, flags: str) -> Counting:
    """One training step of the model of ``flags``: forward, backward and update of one micro batch."""
    with contextlib.ExitStack() as stack:
        counting = Counting()
        _on_one_rank_of_fakes(stack)
        _with_kernels(stack, variant, counting)
        take_step, model = _trainer(flags + " --no-gradient-accumulation-fusion" * (variant != "now"))
        _name_parts(stack, model, counting)
        stack.enter_context(counting)
        take_step()  # makes the optimizer's state
        counting.reset()
        take_step()
    return counting


def _on_one_rank_of_fakes(stack: contextlib.ExitStack) -> None:
    """Tensors without memory; a world of one has nothing to exchange, and no module moves."""

    def gather(found: list, value: object, group=None) -> None:
        found[0] = value

    nothing = dict.fromkeys(("all_reduce", "barrier", "broadcast"), lambda *args, **kwargs: None)
    stack.enter_context(mock.patch.multiple(dist, all_gather_object=gather, **nothing))
    stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", lambda self, *args, **kwargs: self))
    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def _with_kernels(stack: contextlib.ExitStack, variant: str, counting: Counting) -> None:
    """Let each part take the operators that it has in this variant on a GPU, and none of the CPU's."""

    def supports(*tensors: Tensor) -> bool:
        return counting.here() in _TRITON[variant]

    stack.enter_context(launch.observed(counting.launched))
    stack.enter_context(mock.patch.object(launch, "supports", supports))
    stack.enter_context(mock.patch.object(fused, "_kernels", None))
    if variant != "plain":
        stack.enter_context(mock.patch.object(fused, "rms_norm", TorchRMSNorm.apply))
    in_the_product = {"adds_in_fp32": lambda *kind: True, "_add_product": lambda *matrices: None}
    stack.enter_context(mock.patch.multiple(weight_gradient, **in_the_product))
    clipping = {
        "l2_norm_impl": upstream_norm,
        # What a seam of the CPU has put its own in the place of.
        "multi_tensor_scale_impl": utils.__loader__.replaced["local_multi_tensor_scale"],
    }
    if variant == "now":
        clipping = {
            "l2_norm_impl": multi_tensor.foreach_l2_norm,
            "multi_tensor_scale_impl": multi_tensor.foreach_scale,
        }
    stack.enter_context(mock.patch.multiple(clip_grads, **clipping))


def _trainer(flags: str) -> tuple[Callable, list]:
    """(A function that takes one training step, the model)."""
    run = read_args(f"{flags} --device cpu --transformer-impl local".split())
    run = run.but(padded_vocab_size=padded_vocab_size(VOCABULARY, run))
    if not parallel_state.is_initialized():
        distributed.initialize(run)
    config = transformer_config(run)
    model = wrap_for_training(build_model(config, run, initialized=False), config, ddp_config(run))
    optimizer = build_optimizer(optimizer_config(run), model)
    scheduler = build_scheduler(optimizer, run.schedule, run.optimizer)
    connect(model, optimizer, run)
    ids = torch.zeros(run.training.micro_batch_size, run.data.seq_length, dtype=torch.long)
    batch = {"tokens": ids, "labels": ids, "loss_mask": torch.ones(ids.shape), "position_ids": ids}
    model[0].train()
    return lambda: step.train_step([iter([batch])], model, optimizer, scheduler, run), model


def _name_parts(stack: contextlib.ExitStack, model: list, counting: Counting) -> None:
    """Let what modules and functions do count as the part that is theirs."""

    def within(part: str, function: Callable) -> Callable:
        def named(*args, **kwargs):
            with counting.part(part):
                return function(*args, **kwargs)

        return named

    for module in model[0].modules():
        part = _PARTS.get(type(module).__name__)
        if part is not None:
            module.forward = within(part, module.forward)
    inner = unwrap(model[0])
    inner.compute_language_model_loss = within("cross entropy", inner.compute_language_model_loss)
    config = model[0].config
    config.finalize_model_grads_func = within("NaN check", config.finalize_model_grads_func)
    for place, name, part in (
        (step, "forward_backward", "residuals"),
        (step, "check_finite", "NaN check"),
        (mcore_optimizer, "get_grad_norm_fp32", "gradient norm"),
        (mcore_optimizer, "clip_grad_by_total_norm_fp32", "clipping"),
        (adam.FusedAdam, "step", "Adam"),
    ):
        stack.enter_context(mock.patch.object(place, name, within(part, getattr(place, name))))
