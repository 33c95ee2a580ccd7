"""PanGu-pi (arXiv 2312.17276) as transformers' Llama with two modules more.

    MLP        W_down (SIAF(W_gate x) * W_up x),  SIAF(x) = sum_i SiLU(a_i * x + b_i)
    attention  MSA(z) + sum_i U_i gelu(D_i z),    z the normed input

Cache, masks, attention kernels and generation are Llama's own, and so is the attention, where the
configuration asks for nothing that Llama's has not.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_pangu_pi import PanguPiConfig


class PanguPiRMSNorm(LlamaRMSNorm):
    """Llama's norm; with ``layernorm_zero_centered_gamma`` its gain is 1 + its weight."""

    def __init__(self, width: int, config: PanguPiConfig):
        super().__init__(width, eps=config.rms_norm_eps)
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        if not self.zero_centered:
            return super().forward(x)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


class PanguPiOutput(nn.Module):
    """m * norm(y): what a block adds to the residual stream."""

    def __init__(self, config: PanguPiConfig):
        super().__init__()
        self.multiplier = config.residual_multiplier
        self.norm = PanguPiRMSNorm(config.hidden_size, config) if config.norm_placement != "input" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        x = x if self.norm is None else self.norm(x)
        return x if self.multiplier == 1.0 else x * self.multiplier


def rotary_embedding(config: PanguPiConfig, base: float | None = None) -> LlamaRotaryEmbedding:
    """Llama's, of the channels that are rotated; plain and of another ``base`` where one is given."""
    config = copy.copy(config)
    config.head_dim = int(config.head_dim * config.rotary_percent)
    if base is not None:
        config.rope_theta, config.rope_scaling = base, None  # as it was said before transformers 5
        config.rope_parameters = {"rope_type": "default", "rope_theta": base}
    return LlamaRotaryEmbedding(config)


class PanguPiSeriesActivation(nn.Module):
    """sum_{i=1..n} SiLU(a_i * x + b_i), a scale and a bias per term and channel, [n, f] each."""

    def __init__(self, config: PanguPiConfig):
        super().__init__()
        shape = (config.series_activation_order, config.intermediate_size)
        self.scale = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., f] -> [..., f]."""
        terms = zip(self.scale, self.bias, strict=True)
        return sum(F.silu(scale * x + bias) for scale, bias in terms)


class PanguPiMLP(LlamaMLP):
    """Llama's MLP, the gate's SiLU replaced by the series."""

    def __init__(self, config: PanguPiConfig):
        super().__init__(config)
        if config.series_activation_order:
            self.series_activation = PanguPiSeriesActivation(config)
        self.output = PanguPiOutput(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        if not self.config.series_activation_order:
            return self.output(super().forward(x))
        return self.output(self.down_proj(self.series_activation(self.gate_proj(x)) * self.up_proj(x)))


class PanguPiAugmentedShortcut(nn.Module):
    """sum_{i=1..T} U_i gelu(D_i z), the T bottlenecks h -> h/r -> h stacked into one."""

    def __init__(self, config: PanguPiConfig):
        super().__init__()
        h = config.hidden_size
        inner = config.augmented_shortcuts * (h // config.augmented_shortcut_reduction)
        self.down_proj = nn.Linear(h, inner, bias=False)
        self.up_proj = nn.Linear(inner, h, bias=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        return self.up_proj(F.gelu(self.down_proj(z)))


class PanguPiAttention(LlamaAttention):
    """Llama's attention, the shortcuts on the same input, and what other makers' attention has."""

    def __init__(self, config: PanguPiConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.qkv_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                plain = getattr(self, name)
                setattr(self, name, nn.Linear(plain.in_features, plain.out_features, bias=True))
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        self.window: int | None = None
        self.rotary_emb: nn.Module | None = None
        if config.qk_layernorm:
            heads = config.num_attention_heads, config.num_key_value_heads
            heads = heads if config.qk_layernorm_across_heads else (1, 1)
            self.q_norm, self.k_norm = (PanguPiRMSNorm(count * self.head_dim, config) for count in heads)
        if config.attention_multiplier is not None:
            self.scaling = config.attention_multiplier
        self.rotates = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])
        if config.window_size is not None and (config.windowed_layers or [])[layer_idx]:
            self.window = config.window_size
            if config.window_rotary_base is not None:
                self.rotary_emb = rotary_embedding(config, config.window_rotary_base)
        if config.augmented_shortcuts:
            self.augmented_shortcut = PanguPiAugmentedShortcut(config)
        self.output = PanguPiOutput(config)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """[b, s, h] -> [b, s, h] and whatever else Llama's attention returns."""
        own = self.q_norm is not None or self.window is not None or not self.rotates
        own = own or self.config.rotary_percent != 1.0
        attend = self.attend if own else super().forward
        output, *rest = attend(hidden_states, *args, **kwargs)
        if self.config.augmented_shortcuts:
            output = output + self.augmented_shortcut(hidden_states)
        return self.output(output), *rest

    def attend(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[b, s, h] -> [b, s, h] and the attention's weights, if they were asked for."""
        query, key, value = (proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj))
        across_heads = self.config.qk_layernorm_across_heads
        if self.q_norm is not None and self.k_norm is not None and across_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)) for t in (query, key, value))
        if self.q_norm is not None and self.k_norm is not None and not across_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [b, n, s, d]
        if self.rotates:
            if self.rotary_emb is not None:
                position_embeddings = self.rotary_emb(hidden_states, position_ids)
            query, key = rotated(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        if self.window is not None:
            kwargs["sliding_window"] = self.window + 1  # for flash attention, which counts the token itself
            if "flash" not in name:
                attention_mask = with_window(attention_mask, query, key, self.window)
        kernel = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        dropout = self.attention_dropout if self.training else 0.0
        options = dict(dropout=dropout, scaling=self.scaling, **kwargs)
        output, weights = kernel(self, query, key, value, attention_mask, **options)
        return self.o_proj(output.flatten(2)), weights


def rotated(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> list[torch.Tensor]:
    """Both with their first channels rotated, as many as there are angles."""
    width = cos.shape[-1]
    turned = apply_rotary_pos_emb(query[..., :width], key[..., :width], cos, sin)
    return [torch.cat([t, x[..., width:]], -1) for t, x in zip(turned, (query, key), strict=True)]


def with_window(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, window: int
) -> torch.Tensor:
    """Llama's mask [b, 1, s, t], None if it is causal, with the window; queries are the last of the keys."""
    queries, keys = query.shape[-2], key.shape[-2]
    shown = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    shown = shown.tril(keys - queries).triu(keys - queries - window)
    if mask is not None and mask.dtype == torch.bool:
        return mask & shown
    none = torch.zeros(1, 1, queries, keys, dtype=query.dtype, device=query.device)
    return (none if mask is None else mask).masked_fill(~shown, torch.finfo(query.dtype).min)


class PanguPiDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with the two blocks above."""

    def __init__(self, config: PanguPiConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = PanguPiAttention(config, layer_idx)
        self.mlp = PanguPiMLP(config)
        for name in ("input_layernorm", "post_attention_layernorm"):  # of the MLP's input
            normed = config.norm_placement != "output"
            setattr(self, name, PanguPiRMSNorm(config.hidden_size, config) if normed else nn.Identity())


class PanguPiPreTrainedModel(LlamaPreTrainedModel):
    """Initial weights, and what transformers wants to know of the classes."""

    config_class = PanguPiConfig
    _no_split_modules = ["PanguPiDecoderLayer"]
    _can_record_outputs = {"hidden_states": PanguPiDecoderLayer, "attentions": PanguPiAttention}

    def _init_weights(self, module: nn.Module) -> None:
        """A new series starts as plain SiLU, a zero-centered norm's weight at zero, all else as in Llama."""
        if isinstance(module, PanguPiRMSNorm) and module.zero_centered:
            if not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.zeros_(module.weight)
        elif not isinstance(module, PanguPiSeriesActivation):
            super()._init_weights(module)
        elif not getattr(module.scale, "_is_hf_initialized", False):
            with torch.no_grad():
                module.bias.zero_()
                module.scale.zero_()[0].fill_(1.0)


class PanguPiEmbedding(nn.Embedding):
    """Word embeddings times ``embedding_multiplier``."""

    multiplier = 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., h]."""
        return super().forward(ids) * self.multiplier


class PanguPiHead(nn.Linear):
    """Logits divided by ``logits_scaling``."""

    scaling = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., v]."""
        return super().forward(x / self.scaling)


class PanguPiModel(PanguPiPreTrainedModel, LlamaModel):
    """The decoder without its head."""

    def __init__(self, config: PanguPiConfig):
        super().__init__(config)
        if config.embedding_multiplier != 1.0:
            self.embed_tokens = PanguPiEmbedding(config.vocab_size, config.hidden_size, self.padding_idx)
            self.embed_tokens.multiplier = config.embedding_multiplier
        self.norm = PanguPiRMSNorm(config.hidden_size, config)
        self.rotary_emb = rotary_embedding(config)
        self.layers = nn.ModuleList(
            PanguPiDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.post_init()


class PanguPiForCausalLM(PanguPiPreTrainedModel, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: PanguPiConfig):
        super().__init__(config)
        self.model = PanguPiModel(config)
        if config.logits_scaling != 1.0:
            self.lm_head = PanguPiHead(config.hidden_size, config.vocab_size, bias=False)
            self.lm_head.scaling = config.logits_scaling
        self.post_init()
