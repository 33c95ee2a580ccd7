"""RMSNorm and LayerNorm that work under sequence parallelism.

Megatron-Core's ``WrappedTorchNorm`` refuses sequence parallelism, because torch's modules do not
mark their weights for the sum of gradients over the tensor parallel group; these do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.kernels import fused
from megatron_ext.models.config import PanguProConfig


def _parameter(hidden_size: int, value: float, config: PanguProConfig) -> nn.Parameter:
    """A replicated [h] vector; each sequence shard sees part of its gradient."""
    parameter = nn.Parameter(torch.full((hidden_size,), value, dtype=config.params_dtype))
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; [s, b, h] -> [s, b, h]."""

    def __init__(self, config: PanguProConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = _parameter(hidden_size, 1.0, config)

    def forward(self, x: Tensor) -> Tensor:
        return fused.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias; [s, b, h] -> [s, b, h]."""

    def __init__(self, config: PanguProConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = _parameter(hidden_size, 1.0, config)
        self.bias = _parameter(hidden_size, 0.0, config)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def norm_class(config: PanguProConfig) -> type[nn.Module]:
    """The norm that ``config.normalization`` names."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.normalization]
