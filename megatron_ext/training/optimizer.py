"""The optimizer of a run: Megatron-Core's, with our Adam if the machine has no fused one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronConfig
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.kernels.multi_tensor import provide_multi_tensor
from megatron_ext.models.builder import unwrap
from megatron_ext.models.config import fields_of
from megatron_ext.platform.adam import provide_adam
from megatron_ext.training.adam import FusedAdam
from megatron_ext.training.muon import MATRICES, LayerWise, Muon, carry_parts, mark_matrices, zero_state


def optimizer_config(run: RunConfig) -> MegatronConfig:
    """The optimizer's configuration; loss scaling is for fp16 alone."""
    return MegatronConfig(
        **(
            fields_of(run, MegatronConfig)
            | {"fp8_recipe": run.precision.fp8_recipe if run.precision.fp8 else None}
        )
    )


def build_optimizer(config: MegatronConfig, model_chunks: list[nn.Module]) -> MegatronOptimizer:
    """The optimizer that ``config`` names, over this rank's model chunks (wrapped in Megatron-Core's DDP)."""
    return BUILDERS[config.optimizer](config, model_chunks)


def _megatrons(
    config: MegatronConfig, model_chunks: list[nn.Module], adam: type = FusedAdam, **overrides: Any
) -> MegatronOptimizer:
    """Megatron-Core's own: plain, half precision or distributed, with our Adam if it has none.

    As upstream, weight decay applies to matrices only: not to biases and 1-D parameters, and not to
    parameters with ``no_weight_decay = True`` (series-activation scales are 2-D, but they only scale).
    ``overrides``: attribute of parameters -> options of their group that differ.
    """
    provide_adam(adam)
    if platform.on_gpu():  # on a CPU a seam provides it
        provide_multi_tensor()
    # The same override as upstream's, so that these parameters join its group without decay and
    # a checkpoint keeps two groups.
    overrides |= {"no_weight_decay": {"wd_mult": 0.0}}
    keys = {ParamKey(attr=name): override for name, override in overrides.items()}
    return get_megatron_optimizer(
        config, model_chunks, config_overrides=get_standard_config_overrides(config) | keys
    )


def _muon(config: MegatronConfig, model_chunks: list[nn.Module]) -> MegatronOptimizer:
    """Muon, with all its state on every data parallel rank."""
    mark_matrices(map(unwrap, model_chunks), config.muon_split_qkv)
    optimizer = _megatrons(
        replace(config, optimizer="adam"),
        model_chunks,
        Muon.with_options(config),
        muon_parts={MATRICES: True},
    )
    for inner in optimizer.chained_optimizers:
        inner.init_state_fn = zero_state
    carry_parts(optimizer)
    return optimizer


def _layer_wise_muon(config: MegatronConfig, model_chunks: list[nn.Module]) -> MegatronOptimizer:
    """Muon, with each data parallel rank holding the state, and making the updates, of whole tensors."""
    fp32 = replace(config, bf16=False)  # fp32 copies are made after the tensors were shared out
    inner = _muon(fp32, model_chunks).chained_optimizers
    groups = ProcessGroupCollection.use_mpu_process_groups()
    optimizer = LayerWise(inner, config, groups, [zero_state] * len(inner))
    carry_parts(optimizer)
    return optimizer


#: ``--optimizer`` -> its builder.
BUILDERS: dict[str, Callable[[MegatronConfig, list[nn.Module]], MegatronOptimizer]] = {
    "adam": _megatrons,
    "sgd": _megatrons,
    "muon": _muon,
    "dist_muon": _layer_wise_muon,
}
