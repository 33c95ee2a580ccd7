"""The output of attention and FFN, before it is added to the residual stream."""

from collections.abc import Callable

from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_ext.models.config import PanguProConfig


class ResidualOutput(MegatronModule):
    """m * norm(y + bias) of a block's output y: the norm of OLMo 2 and Gemma 3, Granite's multiplier m.

    Without norm and multiplier the bias is returned, to be added with the residual as in Megatron-Core. A
    MegatronModule, because ``MLP.sharded_state_dict`` calls that of each child.

    Shapes: s sequence (the rank's shard of it under sequence parallelism), b batch, h hidden.
    """

    def __init__(self, config: PanguProConfig, norm: Callable[..., nn.Module]):
        super().__init__(config=config)
        self.multiplier = config.residual_multiplier
        self.norm: nn.Module | None = None
        if config.norm_placement != "input":
            self.norm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, output: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[s, b, h], [h] -> [s, b, h] and the bias if it was not added."""
        if self.norm is None and self.multiplier == 1.0:
            return output, bias
        output = output if bias is None else output + bias
        output = output if self.norm is None else self.norm(output)
        return output if self.multiplier == 1.0 else output * self.multiplier, None
