"""Attention of the local spec: torch's fused kernel, and PanGu-pi's augmented shortcut."""

import math
from typing import Any

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ext.kernels import attention, launch, rope
from megatron_ext.models.augmented_shortcut import AugmentedShortcut
from megatron_ext.models.config import PanguProConfig


class ScaledDotProductAttention(MegatronModule):
    """softmax(q k^T / sqrt(d)) v by ``torch.nn.functional.scaled_dot_product_attention``.

    Never holds the [s, s] scores, on a CPU or a GPU, and shares keys and values among the query
    heads of a group without repeating them.

    Shapes: s queries, t keys, b batch, np query heads and ng key/value heads of the tensor
    parallel rank, hn channels a head.
    """

    def __init__(
        self,
        config: PanguProConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        if config.apply_query_key_layer_scaling:
            self.scale /= layer_number

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[s, b, np, hn], [t, b, ng, hn], [t, b, ng, hn] -> [s, b, np * hn].

        ``attention_mask`` (bool, True where attention is forbidden, [b or 1, 1, s, t]) overrides
        the causal mask.
        """
        assert packed_seq_params is None and attention_bias is None
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, hn]
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        context = self._attend(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None and causal and query.size(2) > 1,
        )  # [b, np, s, hn]
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        options = dict(scale=self.scale, enable_gqa=query.size(1) != key.size(1), **mask)
        if not (self.training and self.dropout):
            return F.scaled_dot_product_attention(query, key, value, **options)
        if self.config.sequence_parallel:
            return F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout, **options)
        # Heads of different tensor parallel ranks drop different probabilities.
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout, **options)


class AugmentedSelfAttention(SelfAttention):
    """MSA(z) + sum_i T_i(z): self attention with PanGu-pi's augmented shortcuts on its normed input.

    With the layer's residual this is AugMSA(Z) = MSA(Z) + Z + sum_i T_i(Z). With dropout, the
    layer's dropout falls on the sum. With no shortcut it is Megatron-Core's SelfAttention itself.
    """

    def __init__(self, config: PanguProConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.augmented_shortcuts:
            self.augmented_shortcut = AugmentedShortcut(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> ([s, b, h], bias to be added or None)."""
        plain = attention_mask is None and all(value is None for value in kwargs.values())
        freqs = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
        if plain and self._in_one_pass(hidden_states):
            output, bias = self._attend_in_one_pass(hidden_states, freqs)
        elif (
            plain and freqs is not None and self._on_the_joint_projection() and launch.supports(hidden_states)
        ):
            output, bias = self._split_rotate_and_attend(hidden_states, freqs)
        else:
            output, bias = super().forward(
                hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **kwargs
            )
        if self.config.augmented_shortcuts:
            output = self.augmented_shortcut(hidden_states, output)
        return output, bias

    def _in_one_pass(self, hidden_states: Tensor) -> bool:
        """Whether rotation and attention can run as one kernel: on a CPU, without dropout."""
        return (
            attention.supports(hidden_states, self.config.kv_channels)
            and self._on_the_joint_projection()
            and not (self.training and self.core_attention.dropout)
        )

    def _on_the_joint_projection(self) -> bool:
        """Whether nothing stands between projection, rotation and causal attention, or beside them."""
        config = self.config
        return (
            isinstance(self.core_attention, ScaledDotProductAttention)
            and self.attn_mask_type == AttnMaskType.causal
            and config.num_query_groups >= self.world_size
            and not (config.qk_layernorm or config.qk_l2_norm or config.attention_output_gate)
            and not (config.no_rope_freq or config.test_mode)
            and not self.checkpoint_core_attention
        )

    def _joint_projection(self, hidden_states: Tensor) -> tuple[Tensor, int, int]:
        """[s, b, ng, (r + 2) * hn], the number r of query heads of a group, and hn."""
        mixed, _ = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
        heads_per_group = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        return mixed, heads_per_group, self.hidden_size_per_attention_head

    def _attend_in_one_pass(
        self, hidden_states: Tensor, freqs: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Project, attend, project back; the angles are the same for queries and keys."""
        projection = self._joint_projection(hidden_states)
        context = attention.causal_attention(*projection, freqs, self.core_attention.scale)
        return self.linear_proj(context)  # [s, b, np * hn] -> [s, b, h]

    def _split_rotate_and_attend(self, hidden_states: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same on a GPU, where attention is torch's."""
        query, key, value = rope.split_and_rotate(*self._joint_projection(hidden_states), freqs)
        return self.linear_proj(self.core_attention(query, key, value))
