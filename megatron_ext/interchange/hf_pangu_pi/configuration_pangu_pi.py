"""Configuration of a PanGu-pi model: Llama's, the sizes of the two pi modules, and what other makers have."""

from transformers import LlamaConfig


class PanguPiConfig(LlamaConfig):
    """LlamaConfig and more settings; with their defaults the model but for its pi modules is a Llama.

    Args:
        series_activation_order: terms n of the series informed activation in the MLP; 0: plain SiLU.
        augmented_shortcuts: augmented shortcuts T beside the attention; 0: none.
        augmented_shortcut_reduction: reduction r of a shortcut's bottleneck, hidden -> hidden/r -> hidden.
        qkv_bias: whether queries, keys and values have a bias (the output projection never has one).
        qk_layernorm: whether queries and keys are normalized, each head by itself.
        qk_layernorm_across_heads: ... over all heads together.
        norm_placement: "input": attention and MLP read normed input; "output": what they add to the residual
            stream is normed; "both".
        layernorm_zero_centered_gamma: whether a norm's gain is 1 + its weight.
        rotary_percent: share of a head's channels that is rotated.
        no_rope_layers: 1 for each layer with rotary embedding, 0 for each without; None: all have it.
        window_size: tokens before it that a token of a layer with a window sees; None: there are no windows.
        windowed_layers: 1 for each layer with a window, 0 for each without.
        window_rotary_base: base of the rotary embedding in layers with a window; None: that of the others.
        embedding_multiplier, residual_multiplier, logits_scaling, attention_multiplier: as Granite's; the
            last is None for 1 / sqrt(head_dim).
    """

    model_type = "pangu_pi"

    def __init__(
        self,
        series_activation_order: int = 0,
        augmented_shortcuts: int = 0,
        augmented_shortcut_reduction: int = 32,
        qkv_bias: bool = False,
        qk_layernorm: bool = False,
        qk_layernorm_across_heads: bool = False,
        norm_placement: str = "input",
        layernorm_zero_centered_gamma: bool = False,
        rotary_percent: float = 1.0,
        no_rope_layers: list[int] | None = None,
        window_size: int | None = None,
        windowed_layers: list[int] | None = None,
        window_rotary_base: float | None = None,
        embedding_multiplier: float = 1.0,
        residual_multiplier: float = 1.0,
        logits_scaling: float = 1.0,
        attention_multiplier: float | None = None,
        **kwargs: object,
    ) -> None:
        self.series_activation_order = series_activation_order
        self.augmented_shortcuts = augmented_shortcuts
        self.augmented_shortcut_reduction = augmented_shortcut_reduction
        self.qkv_bias = qkv_bias
        self.qk_layernorm = qk_layernorm
        self.qk_layernorm_across_heads = qk_layernorm_across_heads
        self.norm_placement = norm_placement
        self.layernorm_zero_centered_gamma = layernorm_zero_centered_gamma
        self.rotary_percent = rotary_percent
        self.no_rope_layers = no_rope_layers
        self.window_size = window_size
        self.windowed_layers = windowed_layers
        self.window_rotary_base = window_rotary_base
        self.embedding_multiplier = embedding_multiplier
        self.residual_multiplier = residual_multiplier
        self.logits_scaling = logits_scaling
        self.attention_multiplier = attention_multiplier
        super().__init__(**kwargs)
