"""Runs as on a GPU with Transformer Engine and without Apex, beside runs as on a CPU with neither."""

from unittest import mock

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.tensor_parallel import layers

from megatron_ext import platform
from megatron_ext.models.builder import unwrap
from megatron_ext.models.initialization import shards
from megatron_ext.training import optimizer
from tests.helpers.parallel import Layout
from tests.unit.checkpoint.tiny import Run, arguments

#: What Megatron-Core decides when it is imported, and what our program changes.
_DECIDED = {
    mcore_optimizer: ("Adam", "USING_PYTORCH_OPTIMIZER"),
    distrib_optimizer: ("Adam", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER", "USING_TE_OPTIMIZER"),
    layers: ("fused_weight_gradient_mlp_cuda", "_grad_accum_fusion_available"),
}
_WITH_ENGINE = {module: {name: getattr(module, name) for name in names} for module, names in _DECIDED.items()}
_WITH_ENGINE[layers] = {"fused_weight_gradient_mlp_cuda": None, "_grad_accum_fusion_available": False}


class GpuRun(Run):
    """A run with Transformer Engine: the arguments of a GPU, its optimizer, no Apex."""

    def __post_init__(self) -> None:
        for module, values in _WITH_ENGINE.items():
            for name, value in values.items():
                setattr(module, name, value)
        provide_adam = optimizer.provide_adam

        def on_a_gpu(adam: type) -> None:
            with mock.patch.object(platform, "on_gpu", lambda: True):
                provide_adam(adam)

        with mock.patch.object(optimizer, "provide_adam", on_a_gpu):
            super().__post_init__()
        assert optimizer_class(self).__module__.startswith("transformer_engine")


def run(layout: Layout, engine: bool, flags: tuple = (), pi: str | None = None) -> Run:
    """A tiny run with Transformer Engine's layers and optimizer, or with the local ones on a CPU."""
    words = {} if pi is None else {"pi": pi}
    if engine:
        return GpuRun(arguments(layout, *flags, device="cuda", **words))
    found = Run(arguments(layout, *flags, **words))
    assert not optimizer_class(found).__module__.startswith("transformer_engine")
    return found


def optimizer_class(made: Run) -> type:
    """The class that takes the steps."""
    return type(made.optimizer.chained_optimizers[0].optimizer)


Shards = dict[tuple[str, tuple], torch.Tensor]


def weights(made: Run) -> Shards:
    """Every shard of this rank by its name in checkpoints and its place."""
    return {
        (shard.key, shard.global_offset): shard.data.detach().clone()
        for chunk in made.model
        for shard in shards(unwrap(chunk))
    }


def gradients(made: Run) -> Shards:
    """The same of the gradients that the next update takes."""
    parameters = [p for chunk in made.model for p in chunk.parameters()]
    kept = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.data.copy_(p.main_grad)
    found = weights(made)
    for p, value in zip(parameters, kept, strict=True):
        p.data.copy_(value)
    return found


__all__ = ["GpuRun", "clip_grads", "gradients", "optimizer_class", "run", "weights"]
