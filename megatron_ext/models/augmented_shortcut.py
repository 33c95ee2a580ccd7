"""Augmented shortcut around the attention of PanGu-pi (arXiv 2312.17276, section 4.2)."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_ext.models.config import PanguProConfig


class AugmentedShortcut(MegatronModule):
    """sum_{i=1..T} U_i gelu(D_i z), T bottlenecks h -> h/r -> h, added to the attention's output.

    Stacking the T bottlenecks gives one pair of matmuls: D = [D_1; ...; D_T] of shape [T*h/r, h]
    and U = [U_1, ..., U_T] of shape [h, T*h/r]. Our readings where the paper is silent: no bias,
    z is the normed input that the attention reads, and U starts at zero (``pangu_init`` identity),
    so that the block starts as plain attention.

    Shapes: s sequence (the rank's shard of it under sequence parallelism), b batch, h hidden. The
    weights are replicated over tensor parallel ranks, for they cost 1/(2r) of the attention's
    projections; under sequence parallelism their gradients are summed over the group.
    """

    def __init__(self, config: PanguProConfig):
        super().__init__(config=config)
        h = config.hidden_size
        inner = config.augmented_shortcuts * (h // config.augmented_shortcut_reduction)
        self.down = self._parameter(inner, h)
        self.up = self._parameter(h, inner)

    def _parameter(self, rows: int, columns: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(rows, columns, dtype=self.config.params_dtype))
        parameter.sequence_parallel = self.config.sequence_parallel
        return parameter

    def forward(self, z: Tensor, output: Tensor) -> Tensor:
        """``output`` + sum_i T_i(z), one product that adds; both [s, b, h]."""
        inner = F.gelu(F.linear(z, self.down))  # [s, b, T * h/r]
        return torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), self.up.t()).view_as(output)
