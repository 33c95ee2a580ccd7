"""Slices the target's tensors out of the source's, one at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ext.config.model import ModelConfig
from megatron_ext.inherit.axes import Axis, axes_of, entries, layer_of
from megatron_ext.inherit.selection import Selection
from megatron_ext.inherit.vocabulary import Rows

_UNITS = {
    Axis.QKV: "groups",
    Axis.HEADS: "groups",
    Axis.QUERY_GAIN: "groups",
    Axis.KEY_GAIN: "groups",
    Axis.GATE_UP: "ffn",
    Axis.FFN: "ffn",
    Axis.BOTTLENECK: "bottleneck",
}


def source_key(target_key: str, selection: Selection) -> str:
    """The source's name of a target's tensor, with the number of the source's layer."""
    layer = layer_of(target_key)
    if layer is None:
        return target_key
    return target_key.replace(f".layers.{layer}.", f".layers.{int(selection.layers[layer])}.", 1)


def cut(
    target_key: str, weights: Tensor, selection: Selection, source: ModelConfig, rows: Rows | None
) -> Tensor:
    """The target's tensor ``target_key``, copied from the source's.

    ``rows`` selects rows of the vocabulary; None takes all. Values are copied bit for bit, except for pieces
    that start from the mean of several rows.
    """
    layer = layer_of(target_key)
    for number, axis in enumerate(axes_of(target_key)):
        if axis is Axis.VOCABULARY:
            weights = weights if rows is None else rows.take(weights)
        elif axis is not Axis.TERM:
            weights = weights.index_select(number, kept_entries(axis, layer, selection, source))
    return weights.clone(memory_format=torch.contiguous_format)


def kept_entries(axis: Axis, layer: int | None, selection: Selection, source: ModelConfig) -> Tensor:
    """The entries that the target keeps of an axis of units; ``layer`` is the target's."""
    units = selection.hidden if axis is Axis.HIDDEN else getattr(selection, _UNITS[axis])[layer]
    return entries(axis, units, source)


def grown(
    key: str, weights: Tensor | None, size: tuple[int, ...], draw: Callable[[tuple[int, ...]], Tensor]
) -> Tensor:
    """A tensor of the pi modules, extended to the target's size so that the function does not change.

    New terms of the series activation are 0; if the source has no series, the first term has scale 1. New
    bottleneck units have an ``up`` of 0 and a ``down`` from ``draw(size)``: they have no effect, but are
    trained from the first step on.
    """
    fresh = draw(size) if key.endswith(".down") else torch.zeros(size)
    if weights is None:
        if key.endswith("series_activation.scale"):
            fresh[0] = 1.0
        return fresh
    fresh = fresh.to(weights.dtype)
    fresh[tuple(slice(0, length) for length in weights.shape)] = weights
    return fresh


def rescaled(weights: Tensor, factor: float, model: ModelConfig) -> Tensor:
    """A norm's weights with ``factor`` times the gain, which is 1 + weight where it is zero-centered."""
    besides = float(model.layernorm_zero_centered_gamma)
    return ((weights.float() + besides) * factor - besides).to(weights.dtype)
