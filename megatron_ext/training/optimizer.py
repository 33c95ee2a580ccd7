"""The optimizer of a run: Megatron-Core's, with our Adam where the machine has no fused one."""

from collections.abc import Callable

from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronConfig
from megatron.core.optimizer.optimizer_config import ParamKey
from torch import nn

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.kernels.multi_tensor import provide_multi_tensor
from megatron_ext.models.config import fields_of
from megatron_ext.platform.adam import provide_adam
from megatron_ext.training.adam import FusedAdam


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


def _megatrons(config: MegatronConfig, model_chunks: list[nn.Module]) -> MegatronOptimizer:
    """Megatron-Core's own, plain, half precision or distributed, with our Adam where it has none.

    Weight decay goes to matrices only, as upstream: not to biases and 1-D parameters, and not to
    parameters that carry ``no_weight_decay = True`` (series-activation scales are 2-D, yet they
    scale; they do not mix).
    """
    provide_adam(FusedAdam)
    if platform.on_gpu():  # on a CPU a seam does it
        provide_multi_tensor()
    overrides = get_standard_config_overrides(config)
    # The same override as upstream's, so that these parameters join its group without decay and
    # the groups of a checkpoint stay two.
    overrides[ParamKey(attr="no_weight_decay")] = {"wd_mult": 0.0}
    return get_megatron_optimizer(config, model_chunks, config_overrides=overrides)


#: ``--optimizer`` -> what builds it.
BUILDERS: dict[str, Callable[[MegatronConfig, list[nn.Module]], MegatronOptimizer]] = {
    "adam": _megatrons,
    "sgd": _megatrons,
}
