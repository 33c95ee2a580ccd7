"""Attention: one kernel from the projection to the context, or torch's; the augmented shortcut."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from megatron_ext.kernels import attention, documents, launch, rope
from megatron_ext.models.augmented_shortcut import AugmentedShortcut
from megatron_ext.models.config import PanguProConfig
from megatron_ext.models.norm import HeadsNorm, RMSNorm
from megatron_ext.models.residual_output import ResidualOutput


class ScaledDotProductAttention(MegatronModule):
    """softmax(q k^T / sqrt(d)) v by ``torch.nn.functional.scaled_dot_product_attention``.

    Never holds the [s, s] scores, on a CPU or a GPU, and shares keys and values among the query
    heads of a group without repeating them. A window (``window_size``) is a mask.

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
        self.window = window_of(config, layer_number)

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

        ``attention_mask`` (bool, True where attention is forbidden, [b or 1, 1, s, t]; or the starts
        of documents, int32 [b, s]) overrides the causal mask.
        """
        assert packed_seq_params is None and attention_bias is None
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, hn]
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        if documents.is_starts(attention_mask):
            mask = _shown_in_documents(attention_mask)
        else:
            mask = None if attention_mask is None else ~attention_mask
        if self.window is not None:
            window = _window_mask(query.size(2), key.size(2), self.window, query.dtype, query.device)
            mask = window if mask is None else window.where(mask, -math.inf)
        context = self._attend(
            query, key, value, attn_mask=mask, is_causal=mask is None and causal and query.size(2) > 1
        )  # [b, np, s, hn]
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        if mask["attn_mask"] is not None and query.is_cuda:
            # torch's CUDA kernels support grouped queries or a mask, but not both.
            shared = query.size(1) // key.size(1)
            key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
        options = dict(scale=self.scale, enable_gqa=query.size(1) != key.size(1), **mask)
        if not (self.training and self.dropout):
            return F.scaled_dot_product_attention(query, key, value, **options)
        if self.config.sequence_parallel:
            return F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout, **options)
        # Heads of different tensor parallel ranks drop different probabilities.
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout, **options)


def window_of(config: PanguProConfig, layer_number: int) -> int | None:
    """Number of preceding tokens that a token attends to in this layer; None for all."""
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return config.window_size[0] if windowed else None


@lru_cache(maxsize=2)
def _window_mask(queries: int, keys: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[s, t], 0 where a query attends to a key, else -inf; the queries are at the last positions of the keys.

    Shared by all layers, because attention saves its mask for the backward pass.
    """
    shown = torch.ones(queries, keys, dtype=torch.bool, device=device)
    shown = shown.tril(keys - queries).triu(keys - queries - window)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill(~shown, -math.inf)


#: Shared by all layers, for the same reason.
_shown_in_documents = lru_cache(maxsize=1)(documents.shown)


class AugmentedSelfAttention(SelfAttention):
    """MSA(z) + sum_i T_i(z): self attention with PanGu-pi's augmented shortcuts on its normed input.

    With the layer's residual this is AugMSA(Z) = MSA(Z) + Z + sum_i T_i(Z). With dropout, the
    layer's dropout falls on the sum. With no shortcut it is Megatron-Core's SelfAttention itself.
    """

    def __init__(
        self, config: PanguProConfig, *args: Any, output_norm: Callable[..., nn.Module], **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.rotates = not (config.no_rope_freq and config.no_rope_freq[self.layer_number - 1])
        self.window = window_of(config, self.layer_number)
        self.window_rotation: nn.Module | None = None
        if config.augmented_shortcuts:
            self.augmented_shortcut = AugmentedShortcut(config)
        self.residual_output = ResidualOutput(config, output_norm)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> ([s, b, h], bias to be added or None).

        ``attention_mask``: None for causal attention, the starts of documents [b, s], or a mask
        [b or 1, 1, s, t] as in Megatron-Core.
        """
        plain = attention_mask is None or documents.is_starts(attention_mask)
        plain = plain and all(value is None for value in kwargs.values())
        freqs = self._angles(rotary_pos_emb)
        if plain and self._in_one_pass(hidden_states):
            output, bias = self._attend_in_one_pass(hidden_states, freqs, attention_mask)
        elif plain and freqs is not None and self._rotated_where_it_lies(hidden_states):
            output, bias = self._split_rotate_and_attend(hidden_states, freqs, attention_mask)
        else:
            output, bias = super().forward(hidden_states, attention_mask, rotary_pos_emb=freqs, **kwargs)
        if self.config.augmented_shortcuts:
            output = self.augmented_shortcut(hidden_states, output)
        return self.residual_output(output, bias)

    def _angles(self, rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None) -> Tensor | None:
        """The angles [t, 1, 1, rot] of this layer's rotary embedding, the same for queries and keys."""
        freqs = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
        if freqs is None or not self.rotates:
            return None
        return freqs if self.window_rotation is None else self.window_rotation(freqs.size(0))

    def _in_one_pass(self, hidden_states: Tensor) -> bool:
        """Whether norms, rotation and attention can run as one kernel: on a CPU, without dropout."""
        return (
            attention.supports(hidden_states, self.config.kv_channels)
            and self._on_the_joint_projection()
            and (not self.config.qk_layernorm or isinstance(self.q_layernorm, RMSNorm))
            and not (self.training and self.core_attention.dropout)
        )

    def _rotated_where_it_lies(self, hidden_states: Tensor) -> bool:
        """Whether a GPU's kernel can rotate queries and keys within the projection."""
        return (
            launch.supports(hidden_states)
            and self._on_the_joint_projection()
            and not self.config.qk_layernorm
        )

    def _on_the_joint_projection(self) -> bool:
        """Whether there is nothing but norms between projection, rotation and causal attention."""
        config = self.config
        return (
            isinstance(self.core_attention, ScaledDotProductAttention)
            and self.attn_mask_type == AttnMaskType.causal
            and config.num_query_groups >= self.world_size
            and not (config.qk_l2_norm or config.attention_output_gate or config.test_mode)
            and not self.checkpoint_core_attention
        )

    def _joint_projection(self, hidden_states: Tensor) -> tuple[Tensor, int, int]:
        """[s, b, ng, (r + 2) * hn], the number r of query heads of a group, and hn."""
        mixed, _ = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
        heads_per_group = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        return mixed, heads_per_group, self.hidden_size_per_attention_head

    def _attend_in_one_pass(
        self, hidden_states: Tensor, freqs: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Project, attend, project back; the angles are the same for queries and keys."""
        mixed, heads_per_group, width = self._joint_projection(hidden_states)
        query_norm, key_norm = self.q_layernorm, self.k_layernorm
        norms = None
        if isinstance(query_norm, HeadsNorm):
            mixed = self._normed_across_heads(mixed, heads_per_group, width)
        elif isinstance(query_norm, RMSNorm):
            norms = attention.Norms(query_norm.gain, key_norm.gain, query_norm.eps)
        scale = self.core_attention.scale
        context = attention.causal_attention(
            mixed, heads_per_group, width, freqs, scale, norms, self.window, starts
        )
        return self.linear_proj(context)  # [s, b, np * hn] -> [s, b, h]

    def _normed_across_heads(self, mixed: Tensor, heads_per_group: int, width: int) -> Tensor:
        """[s, b, ng, (r + 2) * hn]: the joint projection with normalized queries and keys."""
        query, key, value = mixed.split([heads_per_group * width, width, width], dim=-1)
        query = self.q_layernorm(query.unflatten(-1, (heads_per_group, width)).flatten(2, 3))
        query = query.unflatten(2, (-1, heads_per_group)).flatten(3)
        return torch.cat([query, self.k_layernorm(key), value], dim=-1)

    def _split_rotate_and_attend(
        self, hidden_states: Tensor, freqs: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same on a GPU, where attention is torch's."""
        query, key, value = rope.split_and_rotate(*self._joint_projection(hidden_states), freqs)
        return self.linear_proj(self.core_attention(query, key, value, starts))
