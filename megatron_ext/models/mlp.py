"""The feed-forward block: SwiGLU with PanGu-pi's series activation."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn

from megatron_ext.kernels import fused
from megatron_ext.models.config import PanguProConfig
from megatron_ext.models.norm import norm_class
from megatron_ext.models.residual_output import ResidualOutput
from megatron_ext.models.series_activation import SeriesActivation


class PanguMLP(MLP):
    """W_2 (SIAF(W_gate x) * W_up x); with the series off it is Megatron-Core's MLP itself.

    The activation's parameters live in a child module, because ``MLP.sharded_state_dict`` walks
    child modules only: a bare parameter would be left out of checkpoints without a word.

    The layer spec names this class rather than a ModuleSpec of it: Megatron-Core warns once a
    layer about a ModuleSpec of any MLP but its own.

    Shapes: s sequence, b batch, h hidden, f = ffn_hidden_size / tp.
    """

    linear_layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    norm_class: Callable[[PanguProConfig], type[nn.Module]] = staticmethod(norm_class)

    def __init__(self, config: PanguProConfig, **_: Any):
        # Later versions of Megatron-Core also name the layer and its process groups (docs/engine.md).
        super().__init__(
            config,
            self.linear_layers,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        if config.series_activation_order:
            self.series_activation = SeriesActivation(config, self.tp_group)
        self.residual_output = ResidualOutput(config, self.norm_class(config))

    @property
    def activation(self) -> Callable[[Tensor], Tensor] | None:
        """[s, b, 2 * f] -> [s, b, f]; None leaves it to Megatron-Core, which knows other activations."""
        config = self.config
        if config.series_activation_order:
            return self.series_activation
        swiglu = config.gated_linear_unit and config.activation_func is F.silu
        return fused.swiglu if swiglu and not config.bias_activation_fusion else None

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> ([s, b, h], bias to be added or None)."""
        if self.activation:
            gate_up, bias = self.linear_fc1(hidden_states)  # [s, b, 2 * f]
            if bias is not None:
                gate_up = gate_up + bias
            output, bias = self.linear_fc2(self.activation(gate_up))  # [s, b, f] -> [s, b, h]
        else:
            output, bias = super().forward(hidden_states, per_token_scale, **kwargs)
        return self.residual_output(output, bias)
