"""Masks for the units of the source model, so that it computes what a slice of it would.

With masks of 0 and 1 the masked model has the logits of the sliced model, which tests check to 1e-5. With
masks of 1 that require gradients, dL/dmask is the first-order effect of a unit (width criterion taylor). Mask
training uses values in between.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_ext.config.model import ModelConfig
from megatron_ext.inherit.selection import Selection
from megatron_ext.models.norm import HeadsNorm


@dataclass
class Masks:
    """A factor for every unit. L layers, h hidden channels, f FFN channels, g query groups.

    The tensors may be replaced while attached: each forward pass reads them again.
    """

    hidden: Tensor  # [h]
    ffn: Tensor  # [L, f]
    groups: Tensor  # [L, g]
    layers: Tensor  # [L]

    @classmethod
    def ones(cls, source: ModelConfig, device: torch.device | str = "cpu") -> "Masks":
        """Masks of 1 for all units."""
        layers = source.num_layers
        sizes = ((source.hidden_size,), (layers, source.ffn_hidden_size), (layers, source.query_groups))
        return cls(*(torch.ones(size, device=device) for size in (*sizes, (layers,))))

    @classmethod
    def of(cls, selection: Selection, source: ModelConfig) -> "Masks":
        """Masks of 1 for the units of ``source`` in ``selection``, 0 for the others."""
        masks = cls.ones(source)
        for mask in vars(masks).values():
            mask.zero_()
        masks.hidden[selection.hidden] = 1.0
        masks.layers[selection.layers] = 1.0
        masks.ffn[selection.layers[:, None], selection.ffn] = 1.0
        masks.groups[selection.layers[:, None], selection.groups] = 1.0
        return masks


@contextmanager
def attached(
    model: nn.Module, masks: Masks, hidden_kept: int | None = None, groups_kept: int | None = None
) -> Iterator[None]:
    """Apply ``masks`` to ``model`` (a GPTModel at tensor and pipeline size 1) inside the context.

    The residual stream is masked where it is written: after the embedding, the attention (with its
    shortcuts) and the MLP, for these before their output norm if they have one. A query group is masked
    before linear_proj, and before a norm across heads; an FFN channel before linear_fc2.
    ``hidden_kept`` is the number k of hidden channels of the slice: RMSNorm then divides by the mean
    square over k channels instead of all h, that is x / sqrt(sum(x^2) / k + eps). As sum(x^2) / k is
    mean(x^2) * h / k, this is done by scaling the gain by sqrt(k / h) and eps by k / h. ``groups_kept`` is
    the same for the query groups of a norm across heads.
    """
    with ExitStack() as stack:

        def hook(handle: RemovableHandle) -> None:
            stack.callback(handle.remove)

        hook(model.embedding.register_forward_hook(lambda _, __, out: out * masks.hidden.to(out)))
        for index, layer in enumerate(model.decoder.layers):
            _hook_layer(hook, index, layer, masks)
        if hidden_kept is not None:
            stack.enter_context(_narrower(_norms_of_hidden(model), hidden_kept / masks.hidden.numel()))
        if groups_kept is not None:
            stack.enter_context(_narrower(_norms_of_heads(model), groups_kept / masks.groups.size(-1)))
        yield


def _hook_layer(hook: Callable[[RemovableHandle], None], index: int, layer: nn.Module, masks: Masks) -> None:
    """Mask one layer's groups and FFN channels at the input of a matmul, and the layer's outputs."""

    def written(block: nn.Module, _: Any, output: Any) -> Any:
        value, bias = output
        normed = block.residual_output.norm is not None  # its input was masked
        mask = masks.layers[index] if normed else masks.hidden * masks.layers[index]
        return value * mask.to(value), bias

    def before_norm(_: nn.Module, inputs: Any) -> Any:
        return (inputs[0] * masks.hidden.to(inputs[0]),)

    def groups(_: nn.Module, inputs: Any) -> Any:
        mask = masks.groups[index].to(inputs[0])
        return inputs[0] * mask.repeat_interleave(inputs[0].size(-1) // mask.numel()), *inputs[1:]

    def heads(_: nn.Module, inputs: Any) -> Any:
        mask = masks.groups[index].to(inputs[0])
        return (inputs[0] * mask.repeat_interleave(inputs[0].size(-2) // mask.numel())[:, None],)

    def ffn(_: nn.Module, inputs: Any) -> Any:
        return inputs[0] * masks.ffn[index].to(inputs[0]), *inputs[1:]

    hook(layer.self_attention.linear_proj.register_forward_pre_hook(groups))
    hook(layer.mlp.linear_fc2.register_forward_pre_hook(ffn))
    for block in (layer.self_attention, layer.mlp):
        hook(block.register_forward_hook(written))
        if block.residual_output.norm is not None:
            hook(block.residual_output.norm.register_forward_pre_hook(before_norm))
    for norm in (layer.self_attention.q_layernorm, layer.self_attention.k_layernorm):
        if isinstance(norm, HeadsNorm):
            hook(norm.register_forward_pre_hook(heads))


def _norms_of_hidden(model: nn.Module) -> list[nn.Module]:
    """The norms over hidden channels."""
    found = [model.decoder.final_layernorm]
    for layer in model.decoder.layers:
        outputs = (layer.self_attention.residual_output.norm, layer.mlp.residual_output.norm)
        found += [layer.input_layernorm, layer.pre_mlp_layernorm, *outputs]
    return [norm for norm in found if norm is not None and not isinstance(norm, IdentityOp)]


def _norms_of_heads(model: nn.Module) -> list[nn.Module]:
    return [norm for norm in model.modules() if isinstance(norm, HeadsNorm)]


@contextmanager
def _narrower(norms: list[Any], share: float) -> Iterator[None]:
    """Let norms divide by the mean square over a ``share`` of their channels; the others are 0."""
    before = [(norm.weight.detach().clone(), norm.eps) for norm in norms]
    with torch.no_grad():
        for norm in norms:
            besides = float(norm.zero_centered_gamma)  # the weight, in the gain
            norm.weight.copy_((norm.weight + besides) * share**0.5 - besides)
            norm.eps *= share
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, (weight, eps) in zip(norms, before, strict=True):
                norm.weight.copy_(weight)
                norm.eps = eps
