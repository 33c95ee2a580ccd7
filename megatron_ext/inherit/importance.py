"""Importance of units, measured on text: of layers by skipping them, of others by first-order Taylor."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.config.model import ModelConfig
from megatron_ext.inherit.calibration import average, forward
from megatron_ext.inherit.masks import Masks, attached
from megatron_ext.training.batch import Batch


def losses_without_each_layer(
    model: nn.Module, config: ModelConfig, loss: Callable[[], float], note: Callable[[int], None]
) -> Tensor:
    """The loss with each layer skipped in turn, float64 [L]; calls ``note`` after each layer.

    The paper's measure of a layer: a skipped layer leaves the residual stream unchanged.
    """
    losses = torch.zeros(config.num_layers, dtype=torch.float64)
    masks = Masks.ones(config, platform.current_device())
    with attached(model, masks):
        for layer in range(config.num_layers):
            masks.layers = torch.ones_like(masks.layers)
            masks.layers[layer] = 0.0
            losses[layer] = loss()
            note(layer)
    return losses


def taylor(model: nn.Module, config: ModelConfig, layers: Tensor, batches: Iterable[Batch]) -> Masks:
    """First-order importance of every unit of the model with only ``layers``.

    The mean over microbatches of (dL/dmask)^2: at a mask of 1, dL/dmask is the sum of activation times
    gradient over the unit's outputs, which is to first order the change of the loss if the unit is removed
    (arXiv 1906.10771, equation 8, which uses weights instead of masks). Returned in the form of masks,
    float64; a collective call.
    """
    masks = Masks.ones(config, platform.current_device())
    masks.layers.zero_()[layers] = 1.0
    for mask in vars(masks).values():
        mask.requires_grad_(True)
    totals = {name: torch.zeros(mask.shape, dtype=torch.float64) for name, mask in vars(masks).items()}
    count = 0
    with attached(model, masks):
        for batch in batches:
            loss = forward(model, batch).sum() / batch.loss_mask.sum()
            gradients = torch.autograd.grad(loss, list(vars(masks).values()))
            for total, gradient in zip(totals.values(), gradients, strict=True):
                total += gradient.double().cpu() ** 2
            count += 1
    return Masks(**{name: average(total / count) for name, total in totals.items()})
