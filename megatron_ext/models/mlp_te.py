"""The feed-forward block on Transformer Engine's linear layers."""

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from torch import nn

from megatron_ext.models.config import PanguProConfig
from megatron_ext.models.mlp import PanguMLP


class TEPanguMLP(PanguMLP):
    """PanguMLP with both projections in FP8 where the configuration asks for it."""

    linear_layers = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)

    @staticmethod
    def norm_class(config: PanguProConfig) -> type[nn.Module]:
        """Transformer Engine's norm of the configured kind."""
        return TENorm
