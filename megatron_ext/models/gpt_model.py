"""Megatron-Core's GPTModel with a loss that needs no copy of the logits."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_ext.kernels import cross_entropy, linear


class PanguModel(GPTModel):
    """GPTModel; with a kernel for it the cross entropy turns the logits into their gradient in place.

    The logits are the largest tensor of a small model's step ([s, b, vocabulary / tp]); Megatron's
    own loss makes several copies of them. The products of all linear layers, the output layer's
    among them, go through ``fused_linear``.

    Args:
        softmax_vocab_size: rows of the vocabulary that take part in the loss's softmax. Those behind
            it are padding: loss and gradients are what they are without them. None: all rows.
    """

    def __init__(self, *args: Any, softmax_vocab_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.softmax_vocab_size = softmax_vocab_size
        linear.speed_up(self)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels [b, s] and logits [s, b, v / tp] -> losses [b, s] in nats, fp32."""
        group = self.pg_collection.tp
        first = get_pg_rank(group) * logits.size(-1)
        if self.config.cross_entropy_loss_fusion or not cross_entropy.supports(logits):
            width = cross_entropy.width_of_shard(logits.size(-1), first, self.softmax_vocab_size)
            return super().compute_language_model_loss(labels, cross_entropy.mask_padding_(logits, width))
        losses = cross_entropy.vocab_parallel_cross_entropy(
            logits,
            labels.transpose(0, 1).contiguous(),
            first=first,
            group=group,
            vocab_size=self.softmax_vocab_size,
        )
        return losses.transpose(0, 1).contiguous()
