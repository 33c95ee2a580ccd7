"""Series informed activation, the nonlinearity of PanGu-pi's FFN (arXiv 2312.17276, section 4.1)."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from megatron_ext.kernels import fused
from megatron_ext.models.config import PanguProConfig


class SeriesActivation(MegatronModule):
    """SIAF(gate) * up with SIAF(x) = sum_{i=1..n} SiLU(a_i * x + b_i), a_i and b_i per channel.

    The paper gives each term its own projection in one equation, which does not fit its own count
    of parameters; as in its measurements there is one projection here, and a scale and a bias per
    term and channel (our reading). With SwiGLU the series takes the place of the gate's SiLU.

    With ``pangu_init`` identity a_1 = 1 and all else is 0: the first term is plain SwiGLU, and the
    others start at zero with a gradient (SiLU'(0) = 1/2). ``fused.series_swiglu_reference`` is the
    formula in two lines; on a CPU and a GPU one fused pass takes its place.

    Shapes: s sequence, b batch, f = ffn_hidden_size / tp, n terms. The parameters are split over
    tensor parallel ranks along f, as the rows of ``linear_fc1``.
    """

    def __init__(self, config: PanguProConfig, tp_group: torch.distributed.ProcessGroup):
        super().__init__(config=config)
        self.tp_group = tp_group
        shape = (config.series_activation_order, config.ffn_hidden_size // tp_group.size())
        self.scale = self._parameter(torch.zeros(shape, dtype=config.params_dtype))
        self.bias = self._parameter(torch.zeros(shape, dtype=config.params_dtype))
        self.scale.data[0].fill_(1.0)

    @staticmethod
    def _parameter(value: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(value)
        parameter.no_weight_decay = True  # it would pull the scales away from identity
        return parameter

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, 2 * f] -> [s, b, f]."""
        return fused.series_swiglu(x, self.scale, self.bias)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Both parameters split along f over the tensor parallel group."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"scale": 1, "bias": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
