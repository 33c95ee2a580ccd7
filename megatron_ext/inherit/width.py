"""Scores of hidden channels, FFN channels, query groups and bottleneck units; high scores are kept."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.config.model import ModelConfig
from megatron_ext.inherit.axes import Axis, axes_of, layer_of, unit_sums
from megatron_ext.inherit.selection import Selection, top

#: The score that the entries of an axis add to; the vocabulary is selected by its tokenizer.
_SCORED = {
    Axis.HIDDEN: "hidden",
    Axis.QKV: "groups",
    Axis.HEADS: "groups",
    Axis.GATE_UP: "ffn",
    Axis.FFN: "ffn",
    Axis.BOTTLENECK: "bottleneck",
}


@dataclass
class Scores:
    """One score per unit, for a source of L layers."""

    hidden: Tensor  # [h]
    ffn: Tensor  # [L, f]
    groups: Tensor  # [L, g]
    bottleneck: Tensor  # [L, b]

    @classmethod
    def zeros(cls, source: ModelConfig) -> "Scores":
        """Zero scores, in float64 for sums of millions of squares."""
        return cls(*(torch.zeros(size, dtype=torch.float64) for size in _sizes(source)))


def _sizes(source: ModelConfig) -> list[tuple[int, ...]]:
    layers = source.num_layers
    per_layer = (source.ffn_hidden_size, source.query_groups, source.shortcut_width)
    return [(source.hidden_size,), *((layers, count) for count in per_layer)]


def select(scores: Scores, layers: Tensor, target: ModelConfig) -> Selection:
    """Select the units with the highest scores in the kept layers."""
    available = scores.bottleneck.size(1)
    return Selection(
        layers=layers,
        hidden=top(scores.hidden, target.hidden_size),
        ffn=top(scores.ffn[layers], target.ffn_hidden_size),
        groups=top(scores.groups[layers], target.query_groups),
        bottleneck=top(scores.bottleneck[layers], min(target.shortcut_width, available)),
    )


def random(source: ModelConfig, seed: int) -> Scores:
    """Random scores, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return Scores(*(torch.rand(size, generator=generator) for size in _sizes(source)))


def magnitude(keys: Iterable[str], get: Callable[[str], Tensor], source: ModelConfig, power: int) -> Scores:
    """Sum of |w|^power over all weights of a unit: ``power`` 1 is l1, 2 is l2.

    One tensor is in memory at a time. Only matrices count: a norm's gains, biases and the scales of the
    series activation have another meaning and another magnitude.
    """
    scores = Scores.zeros(source)
    for key in keys:
        axes = axes_of(key)
        if len(axes) < 2 or Axis.TERM in axes:
            continue
        weights = get(key).float().abs().pow_(power)
        for number, axis in enumerate(axes):
            if axis is Axis.VOCABULARY:
                continue
            sums = unit_sums(axis, weights.sum(1 - number, dtype=torch.float64), source)
            of_kind = getattr(scores, _SCORED[axis])
            (of_kind if axis is Axis.HIDDEN else of_kind[layer_of(key)]).add_(sums)
    return scores
