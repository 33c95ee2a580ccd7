"""The fields of a model, one for each flag, and the sizes derived from them.

Names are Megatron-LM's; nothing here needs torch. The rules are in ``model_rules.py``, the tensors in
``model_tensors.py``; :class:`ModelConfig` combines them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.common.flags import derived, flag
from megatron_ext.config.layer_pattern import Pattern, every, pattern, window
from megatron_ext.config.needs import GROUPED, QK_NORM, ROPE_SCALING, ROTARY, SHORTCUTS, WINDOW


@dataclass(frozen=True, kw_only=True)
class ModelFields:
    """The fields of :class:`ModelConfig`; their values are not validated here.

    Shapes below use s sequence length, h hidden size, f FFN size, n heads, g query groups, d channels per
    head, v rows of the vocabulary.
    """

    num_layers: int = flag(0, default=None, minimum=1)
    """Number of transformer layers."""

    hidden_size: int = flag(0, default=None, minimum=1)
    """Channels of the residual stream."""

    ffn_hidden_size: int = flag(0, default=None, minimum=1)
    """Channels inside the FFN; by default 4 times --hidden-size, or 8/3 of it in multiples of 64 with
    --swiglu."""

    num_attention_heads: int = flag(0, default=None, minimum=1)
    """Number of attention heads."""

    kv_channels: int = flag(0, default=None, minimum=1)
    """Channels per head; by default --hidden-size divided by --num-attention-heads."""

    group_query_attention: bool = False
    """Share keys and values among groups of query heads; --num-query-groups is the number of groups."""

    num_query_groups: int | None = flag(None, default=1, minimum=1, needs=[GROUPED])
    """Number of groups of query heads that share keys and values (--group-query-attention)."""

    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """The norm of attention and FFN, and at the end."""

    norm_placement: Literal["input", "output", "both"] = "input"
    """Normalize the input of attention and FFN, their output before the residual addition (OLMo 2), or both
    (Gemma 3)."""

    layernorm_epsilon: float = flag(1e-05, "--norm-epsilon", above=0)
    """Term added to the norm's denominator, for numerical stability."""

    layernorm_zero_centered_gamma: bool = flag(False, "--apply-layernorm-1p")
    """Norms multiply by 1 + weight, with weights initialized to zero."""

    add_bias_linear: bool = flag(True, "--disable-bias-linear")
    """No biases in linear layers."""

    add_qkv_bias: bool = False
    """Use biases for queries, keys and values only."""

    qk_layernorm: bool = False
    """Normalize the queries and keys of each head."""

    qk_layernorm_across_heads: bool = flag(False, needs=[QK_NORM])
    """Normalize queries, and keys, over all heads together instead of per head, as OLMo 2 does."""

    softmax_scale: float | None = flag(None, above=0)
    """Scale of the attention scores; by default 1 / sqrt(--kv-channels)."""

    window_size: tuple[int, ...] | None = flag(None, type=window, metavar="LEFT,0")
    """Sliding window attention: a token attends to itself and to the LEFT tokens before it."""

    window_attn_skip_freq: Pattern | None = flag(None, type=pattern, metavar="N|LIST", needs=[WINDOW])
    """Layers with full attention despite --window-size: every N-th layer, or those with a 0 in the list, such
    as ([1]*5+[0])*4."""

    max_position_embeddings: int = flag(0, default=None, minimum=1)
    """Maximum sequence length of the model; at least --seq-length."""

    position_embedding_type: Literal["learned_absolute", "rope", "mrope", "relative", "none"] = flag(
        "learned_absolute", refused=["mrope", "relative"]
    )
    """Position embedding; PanGu-pi and Llama use rope."""

    rotary_base: int = flag(10000, minimum=1, needs=[ROTARY])
    """Base of the rotary embedding's wavelengths."""

    rotary_percent: float = flag(1.0, minimum=0, maximum=1, needs=[ROTARY])
    """Fraction of each head's channels that is rotated."""

    rotary_seq_len_interpolation_factor: int | None = flag(None, minimum=1, needs=[ROTARY])
    """Divide positions by this factor, to stretch rotary embeddings over longer sequences."""

    use_rope_scaling: bool = flag(False, needs=[ROTARY])
    """Stretch long wavelengths of the rotary embedding as Llama 3.1 and later do: those above 8192 positions
    by --rope-scaling-factor, those below 2048 not at all."""

    rope_scaling_factor: float = flag(8.0, minimum=1, needs=[ROPE_SCALING])
    """Factor of --use-rope-scaling: 8 in Llama 3.1, 32 in the small models of Llama 3.2."""

    no_rope_freq: Pattern | None = flag(None, type=pattern, metavar="N|LIST", needs=[ROTARY])
    """Layers without rotary embedding: every N-th layer, or those with a 1 in the list, such as
    ([0]*3+[1])*9."""

    window_rotary_base: int | None = flag(None, minimum=1, needs=[ROTARY, WINDOW])
    """Base of the rotary embedding in layers with a window, which is not scaled; by default --rotary-base."""

    swiglu: bool = False
    """Gated FFN with SiLU: silu(x W_gate) * (x W_up)."""

    squared_relu: bool = False
    """Squared ReLU in the FFN instead of GELU."""

    quick_geglu: bool = False
    """Gated FFN with the sigmoid approximation of GELU."""

    geglu: bool = False
    """Gated FFN with the tanh approximation of GELU: gelu(x W_gate) * (x W_up)."""

    embedding_multiplier: float = flag(1.0, above=0)
    """Multiply the word embeddings by this factor before the first layer."""

    residual_multiplier: float = flag(1.0, above=0)
    """Multiply the outputs of attention and FFN by this factor before the residual addition."""

    logits_scaling: float = flag(1.0, above=0)
    """Divide the logits by this factor."""

    untie_embeddings_and_output_weights: bool = False
    """Use separate weights for the output layer instead of the word embedding's."""

    series_activation_order: int = flag(0, minimum=0)
    """Number of terms n of the series informed activation in the FFN; 0 uses the plain activation."""

    augmented_shortcuts: int = flag(0, minimum=0)
    """Number of augmented shortcuts T around the attention; 0 uses only the residual connection."""

    augmented_shortcut_reduction: int = flag(32, minimum=1, needs=[SHORTCUTS])
    """Reduction r of an augmented shortcut's bottleneck, hidden -> hidden/r -> hidden."""

    padded_vocab_size: int | None = flag(None, minimum=1)
    """Rows of the embedding; by default the vocabulary's size rounded up to a multiple of
    --make-vocab-size-divisible-by."""

    softmax_vocab_size: int | None = derived(None)
    """Rows in the softmax: the tokenizer's pieces, possibly with padding (--vocab-padding)."""

    @property
    def tied(self) -> bool:
        """Whether embedding and output layer share one matrix."""
        return not self.untie_embeddings_and_output_weights

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate."""
        return self.swiglu or self.quick_geglu or self.geglu

    @property
    def has_pi(self) -> bool:
        """Whether the model has a PanGu-pi module."""
        return bool(self.series_activation_order or self.augmented_shortcuts)

    @property
    def unrotated(self) -> tuple[int, ...]:
        """For each layer 1 if it has no rotary embedding, else 0."""
        return (
            (0,) * self.num_layers if self.no_rope_freq is None else every(self.no_rope_freq, self.num_layers)
        )

    @property
    def windowed(self) -> tuple[int, ...]:
        """For each layer 1 if its attention has a window, else 0."""
        freq, layers = self.window_attn_skip_freq, self.num_layers
        if self.window_size is None or freq is None:
            return (int(self.window_size is not None),) * layers
        return tuple(1 - full for full in every(freq, layers)) if isinstance(freq, int) else freq

    @property
    def query_groups(self) -> int:
        """g: number of key and value heads."""
        return (self.group_query_attention and self.num_query_groups) or self.num_attention_heads

    @property
    def heads_per_group(self) -> int:
        """n / g: number of query heads that share a key and a value."""
        return self.num_attention_heads // self.query_groups

    @property
    def query_width(self) -> int:
        """n d."""
        return self.num_attention_heads * self.kv_channels

    @property
    def qkv_width(self) -> int:
        """(n + 2 g) d: rows of ``linear_qkv``."""
        return self.query_width + 2 * self.query_groups * self.kv_channels

    @property
    def shortcut_width(self) -> int:
        """T h / r: total width of the bottlenecks of all augmented shortcuts."""
        return self.augmented_shortcuts * (self.hidden_size // self.augmented_shortcut_reduction)

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, padding included."""
        return self.padded_vocab_size or self.softmax_vocab_size or 0

    @property
    def vocab_size(self) -> int:
        """Rows in the softmax: those without padding, or all rows if the number of those is unknown."""
        return self.softmax_vocab_size or self.padded_vocab_size or 0
