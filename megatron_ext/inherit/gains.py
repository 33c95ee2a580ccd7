"""Gains of norms, so that a sliced norm keeps the scale of its output.

RMSNorm divides by the root mean square r over the channels there are; over the kept channels K alone it is
another number, r'. Of a token with the source's output y on K the slice's output is y' = y r / r'. The factor
of the gain that makes good for it, in the least squares over all tokens t of a text, is

    argmin_g sum_t |g y'_t - y_t|^2 = sum_t <y'_t, y_t> / sum_t |y'_t|^2
                                    = sum_t |y'_t|^2 (r'_t / r_t) / sum_t |y'_t|^2.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.config.model import ModelConfig
from megatron_ext.inherit.axes import Axis, axes_of, layer_of
from megatron_ext.inherit.calibration import average, checkpoint_name, forward
from megatron_ext.inherit.masks import Masks, attached
from megatron_ext.inherit.selection import Selection
from megatron_ext.inherit.slicing import kept_entries, source_key
from megatron_ext.training.batch import Batch


@torch.no_grad()
def gain_factors(
    model: nn.Module,
    source: ModelConfig,
    target: ModelConfig,
    selection: Selection,
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Of each norm that loses channels, by its name in the target's checkpoint, the factor of its gain.

    Measured in the source ``model`` with the kept layers alone; a collective call.
    """
    kept = {key: of for key in target.parameters() if (of := _kept(key, selection, source)) is not None}
    modules = _modules(model)
    sums = {key: torch.zeros(2, dtype=torch.float64) for key in kept}
    masks = Masks.ones(source, platform.current_device())
    masks.layers.zero_()[selection.layers] = 1.0
    with ExitStack() as stack:
        stack.enter_context(attached(model, masks))
        for key, entries in kept.items():
            norm = modules[source_key(key, selection)]
            hook = _Measured(sums[key], entries.to(platform.current_device()))
            stack.callback(norm.register_forward_pre_hook(hook).remove)
        for batch in batches:
            forward(model, batch)
    measured = average(torch.stack(list(sums.values()))) if sums else torch.zeros(0, 2)
    return {key: (with_all / alone).item() for key, (with_all, alone) in zip(sums, measured, strict=True)}


class _Measured:
    """Adds to ``sums`` the two sums of the formula, for each input of a norm."""

    def __init__(self, sums: Tensor, kept: Tensor) -> None:
        self.sums, self.kept = sums, kept

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        gain = norm.weight.float() + float(norm.zero_centered_gamma)
        x = inputs[0].float()
        x = x.flatten(-2) if x.size(-1) != gain.numel() else x  # the heads of a norm across heads
        within = x.index_select(-1, self.kept)
        squares = [each.square().mean(-1) + norm.eps for each in (x, within)]
        size = (within * gain[self.kept]).square().sum(-1) / squares[1]
        ratio = (squares[1] / squares[0]).sqrt()
        self.sums += torch.stack([(size * ratio).double().sum(), size.double().sum()]).cpu()


def _kept(key: str, selection: Selection, source: ModelConfig) -> Tensor | None:
    """The channels that a norm keeps; None for other tensors, and for norms that lose none."""
    axes = axes_of(key)
    if len(axes) != 1 or axes[0] not in (Axis.HIDDEN, Axis.QUERY_GAIN, Axis.KEY_GAIN):
        return None
    kept = kept_entries(axes[0], layer_of(key), selection, source)
    return kept if len(kept) < source.parameters()[source_key(key, selection)][0] else None


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name of a parameter in checkpoints -> the module that has it."""
    return {
        checkpoint_name(name): model.get_submodule(name.rpartition(".")[0])
        for name, _ in model.named_parameters()
    }
