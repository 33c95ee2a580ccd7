"""PanGu-pi (arXiv 2312.17276) as transformers' Llama with two modules more.

    MLP        W_down (SIAF(W_gate x) * W_up x),  SIAF(x) = sum_i SiLU(a_i * x + b_i)
    attention  MSA(z) + sum_i U_i gelu(D_i z),    z the normed input

Cache, masks, attention kernels and generation are Llama's own.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
)

from .configuration_pangu_pi import PanguPiConfig


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        if not self.config.series_activation_order:
            return super().forward(x)
        return self.down_proj(self.series_activation(self.gate_proj(x)) * self.up_proj(x))


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
    """Llama's attention, and the shortcuts on the same input."""

    def __init__(self, config: PanguPiConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.qkv_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                plain = getattr(self, name)
                setattr(self, name, nn.Linear(plain.in_features, plain.out_features, bias=True))
        if config.augmented_shortcuts:
            self.augmented_shortcut = PanguPiAugmentedShortcut(config)

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> tuple[object, ...]:
        """[b, s, h] -> [b, s, h] and whatever else Llama's attention returns."""
        output, *rest = super().forward(hidden_states, *args, **kwargs)
        if self.config.augmented_shortcuts:
            output = output + self.augmented_shortcut(hidden_states)
        return output, *rest


class PanguPiDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with the two blocks above."""

    def __init__(self, config: PanguPiConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = PanguPiAttention(config, layer_idx)
        self.mlp = PanguPiMLP(config)


class PanguPiPreTrainedModel(LlamaPreTrainedModel):
    """Initial weights, and what transformers wants to know of the classes."""

    config_class = PanguPiConfig
    _no_split_modules = ["PanguPiDecoderLayer"]
    _can_record_outputs = {"hidden_states": PanguPiDecoderLayer, "attentions": PanguPiAttention}

    def _init_weights(self, module: nn.Module) -> None:
        """A new series starts as plain SiLU; everything else as in Llama."""
        if not isinstance(module, PanguPiSeriesActivation):
            super()._init_weights(module)
        elif not getattr(module.scale, "_is_hf_initialized", False):
            with torch.no_grad():
                module.bias.zero_()
                module.scale.zero_()[0].fill_(1.0)


class PanguPiModel(PanguPiPreTrainedModel, LlamaModel):
    """The decoder without its head."""

    def __init__(self, config: PanguPiConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            PanguPiDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.post_init()


class PanguPiForCausalLM(PanguPiPreTrainedModel, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: PanguPiConfig):
        super().__init__(config)
        self.model = PanguPiModel(config)
        self.post_init()
