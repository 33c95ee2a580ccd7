"""RMSNorm and LayerNorm that work under sequence parallelism.

Megatron-Core's ``WrappedTorchNorm`` refuses sequence parallelism, because torch's modules do not
mark their weights for the sum of gradients over the tensor parallel group; these do.
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from megatron_ext.kernels import fused
from megatron_ext.models.config import PanguProConfig


def _parameter(hidden_size: int, value: float, config: PanguProConfig) -> nn.Parameter:
    """A replicated [h] vector; each sequence shard sees part of its gradient."""
    parameter = nn.Parameter(torch.full((hidden_size,), value, dtype=config.params_dtype))
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


class Norm(nn.Module):
    """Base of RMSNorm and LayerNorm: the gain, 1 + weight with ``layernorm_zero_centered_gamma``."""

    def __init__(self, config: PanguProConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.weight = _parameter(hidden_size, 0.0 if self.zero_centered_gamma else 1.0, config)

    @property
    def gain(self) -> Tensor:
        """The factor of the normalized values, [h]."""
        return 1 + self.weight if self.zero_centered_gamma else self.weight


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * gain, over the last dimension; [s, b, h] -> [s, b, h]."""

    def forward(self, x: Tensor) -> Tensor:
        return fused.rms_norm(x, self.gain, self.eps)


class LayerNorm(Norm):
    """(x - mean(x)) / sqrt(var(x) + eps) * gain + bias; [s, b, h] -> [s, b, h]."""

    def __init__(self, config: PanguProConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(config, hidden_size, eps)
        self.bias = _parameter(hidden_size, 0.0, config)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.gain, self.bias, self.eps)


class HeadsNorm(RMSNorm):
    """RMSNorm of queries, or of keys, over the channels of all heads together (OLMo 2, arXiv 2501.00656).

    Each tensor parallel rank has only its own heads, so the sum of squares is all-reduced. The weight is
    replicated and each rank uses its heads' part; Megatron-Core all-reduces its gradient, as for the norm of
    single heads.

    Shapes: s sequence, b batch, n heads of all ranks, p ranks, d channels of a head; weight [n * d].
    """

    def __init__(self, config: PanguProConfig, hidden_size: int, eps: float = 1e-5, heads: int = 1):
        super().__init__(config, heads * hidden_size, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, n/p, d] -> [s, b, n/p, d]."""
        group = parallel_state.get_tensor_model_parallel_group()
        flat = x.flatten(-2)  # [s, b, n/p * d]
        if group.size() == 1:
            return super().forward(flat).view_as(x)
        # Without a cast of the tensor, so that no fp32 copy of it is saved for the backward pass.
        squares = torch.linalg.vector_norm(flat, dim=-1, keepdim=True, dtype=torch.float32).square()
        total = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normed = flat * torch.rsqrt(total / self.weight.numel() + self.eps)
        return (normed.to(x.dtype) * self.gain.chunk(group.size())[group.rank()]).view_as(x)


def norm_class(config: PanguProConfig) -> type[nn.Module]:
    """The norm that ``config.normalization`` names."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.normalization]
