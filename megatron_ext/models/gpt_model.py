"""Megatron-Core's GPTModel with a loss that needs no copy of the logits."""

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_ext.kernels import cross_entropy, linear
from megatron_ext.kernels.distillation import vocab_parallel_distillation
from megatron_ext.kernels.teacher_targets import TeacherTargets


class PanguModel(GPTModel):
    """GPTModel; with a kernel for it the cross entropy turns the logits into their gradient in place.

    The logits are the largest tensor of a small model's step ([s, b, vocabulary / tp]); Megatron's
    own loss makes several copies of them. The products of all linear layers, the output layer's
    among them, go through ``fused_linear``.

    Args:
        softmax_vocab_size: rows of the vocabulary that take part in the loss's softmax. Those behind
            it are padding: loss and gradients are what they are without them. None: all rows.

    Attributes:
        z_loss: coefficient of the auxiliary loss on the log of the softmax's denominator; 0 until it is set.
    """

    z_loss = 0.0

    def __init__(self, *args: Any, softmax_vocab_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.softmax_vocab_size = softmax_vocab_size
        self._targets: TeacherTargets | None = None
        linear.speed_up(self)
        if self.config.window_rotary_base:
            self._rotate_windows_otherwise()

    def _rotate_windows_otherwise(self) -> None:
        """Give the layers with a window another rotary embedding (Gemma 3), one module for all of them."""
        rotation = RotaryEmbedding(
            self.config.kv_channels,
            self.rotary_percent,
            rotary_base=self.config.window_rotary_base,
            use_cpu_initialization=self.config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
        )
        for layer in self.decoder.layers:
            if layer.self_attention.window is not None:
                layer.self_attention.window_rotation = rotation

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        decoder_input: Tensor | None = None,
        targets: TeacherTargets | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As in GPTModel, with the embeddings multiplied by ``embedding_multiplier``.

        With ``targets`` of a teacher, [s, b, ...], the last stage returns two losses [b, s] in nats: cross
        entropy and the divergence from the teacher.
        """
        multiplier = self.config.embedding_multiplier
        if self.pre_process and decoder_input is None and multiplier != 1.0:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids) * multiplier
        self._targets = targets  # GPTModel's forward has no way through for them
        try:
            return super().forward(input_ids, position_ids, attention_mask, decoder_input, **kwargs)
        finally:
            self._targets = None

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Divide the hidden states instead of the logits, which are much larger."""
        if self.post_process and self.config.logits_scaling != 1.0:
            hidden_states = hidden_states / self.config.logits_scaling
        return super()._postprocess(hidden_states, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Labels [b, s] and logits [s, b, v / tp] -> losses [b, s] in nats, fp32; two with a teacher."""
        group = self.pg_collection.tp
        first = get_pg_rank(group) * logits.size(-1)
        target = labels.transpose(0, 1).contiguous()
        how: dict[str, Any] = {
            "first": first,
            "group": group,
            "vocab_size": self.softmax_vocab_size,
            "z_loss": self.z_loss,
        }
        if self._targets is not None:
            both = vocab_parallel_distillation(logits, target, self._targets, **how)
            return both[0].transpose(0, 1).contiguous(), both[1].transpose(0, 1).contiguous()
        ours = self.z_loss or cross_entropy.supports(logits)
        if self.config.cross_entropy_loss_fusion or not ours:
            width = cross_entropy.width_of_shard(logits.size(-1), first, self.softmax_vocab_size)
            return super().compute_language_model_loss(labels, cross_entropy.mask_padding_(logits, width))
        losses = cross_entropy.vocab_parallel_cross_entropy(logits, target, **how)
        return losses.transpose(0, 1).contiguous()
