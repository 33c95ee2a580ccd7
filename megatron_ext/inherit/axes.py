"""The axes of a model's tensors, at tensor parallel size 1.

One table for all tensors, which slicing and magnitude scores both read. A unit is kept or dropped as a whole:
a hidden channel of the residual stream, a channel of a layer's FFN, a query group of a layer (its query
heads, key and value), or a unit of a layer's shortcut bottleneck.
"""

import re
from enum import Enum

import torch
from torch import Tensor

from megatron_ext.config.model import ModelConfig


class Axis(Enum):
    """The kind of an axis; the value names the kind of unit that its entries belong to."""

    VOCABULARY = "vocabulary"
    HIDDEN = "hidden"
    QKV = "groups"
    """Rows of linear_qkv: per query group its query heads, its key, its value, hn channels each."""
    HEADS = "groups of heads"
    """Columns of linear_proj: the query heads, those of a group side by side."""
    QUERY_GAIN, KEY_GAIN = "groups of queries", "groups of keys"
    """Gains of the norms of queries and keys, per head (kept whole) or across heads."""
    GATE_UP = "ffn twice"
    """Rows of linear_fc1: all gates, then all ups."""
    FFN = "ffn"
    BOTTLENECK = "bottleneck"
    TERM = "term"
    """Terms of the series activation, which inheritance never drops."""


#: Name of a tensor in checkpoints (without ``decoder.layers.N.``) -> its axes.
AXES: dict[str, tuple[Axis, ...]] = {
    "embedding.word_embeddings.weight": (Axis.VOCABULARY, Axis.HIDDEN),
    "output_layer.weight": (Axis.VOCABULARY, Axis.HIDDEN),
    "decoder.final_layernorm.weight": (Axis.HIDDEN,),
    "self_attention.linear_qkv.layer_norm_weight": (Axis.HIDDEN,),
    "self_attention.linear_qkv.weight": (Axis.QKV, Axis.HIDDEN),
    "self_attention.linear_qkv.bias": (Axis.QKV,),
    "self_attention.q_layernorm.weight": (Axis.QUERY_GAIN,),
    "self_attention.k_layernorm.weight": (Axis.KEY_GAIN,),
    "self_attention.linear_proj.weight": (Axis.HIDDEN, Axis.HEADS),
    "self_attention.augmented_shortcut.down": (Axis.BOTTLENECK, Axis.HIDDEN),
    "self_attention.augmented_shortcut.up": (Axis.HIDDEN, Axis.BOTTLENECK),
    "self_attention.residual_output.norm.weight": (Axis.HIDDEN,),
    "mlp.linear_fc1.layer_norm_weight": (Axis.HIDDEN,),
    "mlp.linear_fc1.weight": (Axis.GATE_UP, Axis.HIDDEN),
    "mlp.series_activation.scale": (Axis.TERM, Axis.FFN),
    "mlp.series_activation.bias": (Axis.TERM, Axis.FFN),
    "mlp.linear_fc2.weight": (Axis.HIDDEN, Axis.FFN),
    "mlp.residual_output.norm.weight": (Axis.HIDDEN,),
}

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def layer_of(key: str) -> int | None:
    """The layer of a tensor, from 0; None for tensors outside of the layers."""
    match = _LAYER.fullmatch(key)
    return int(match[1]) if match else None


def axes_of(key: str) -> tuple[Axis, ...]:
    """The axes of the tensor ``key``.

    Raises:
        LookupError: unknown tensor; guessing its axes would silently break the model.
    """
    match = _LAYER.fullmatch(key)
    name = match[2] if match else key
    if name not in AXES:
        raise LookupError(f"{key}: inheritance does not know what the axes of this tensor count")
    return AXES[name]


def _entries_a_group(axis: Axis, source: ModelConfig) -> int:
    heads = {Axis.QKV: source.heads_per_group + 2, Axis.KEY_GAIN: 1}.get(axis, source.heads_per_group)
    return heads * source.kv_channels


def entries(axis: Axis, units: Tensor, source: ModelConfig) -> Tensor:
    """The entries of an axis of ``source`` that belong to ``units``; both int64."""
    if axis in (Axis.QUERY_GAIN, Axis.KEY_GAIN) and not source.qk_layernorm_across_heads:
        return torch.arange(source.kv_channels)
    if axis in (Axis.QKV, Axis.HEADS, Axis.QUERY_GAIN, Axis.KEY_GAIN):
        size = _entries_a_group(axis, source)
        return (units[:, None] * size + torch.arange(size)).flatten()
    if axis is Axis.GATE_UP:
        return torch.cat([units, units + source.ffn_hidden_size])
    return units


def unit_sums(axis: Axis, values: Tensor, source: ModelConfig) -> Tensor:
    """Sum values per entry of an axis to values per unit."""
    if axis in (Axis.QKV, Axis.HEADS):
        return values.unflatten(0, (-1, _entries_a_group(axis, source))).sum(1)
    if axis is Axis.GATE_UP:
        return values.unflatten(0, (2, -1)).sum(0)
    return values
