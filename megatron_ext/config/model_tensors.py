"""The tensors of a model: their names in checkpoints, their shapes, the number of parameters."""

from __future__ import annotations

import math

from megatron_ext.config.model_fields import ModelFields

Tensors = dict[str, tuple[int, ...]]


def of_model(model: ModelFields, layers: int) -> Tensors:
    """See :meth:`ModelConfig.parameters`; with as many of its layers."""
    h, v = model.hidden_size, model.vocab_rows
    tensors: Tensors = {"embedding.word_embeddings.weight": (v, h)}
    if model.position_embedding_type == "learned_absolute":
        tensors["embedding.position_embeddings.weight"] = (model.max_position_embeddings, h)
    layer = of_layer(model)
    for number in range(layers):
        tensors |= {f"decoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    tensors |= _norm(model, "decoder.final_layernorm.", h)
    return tensors if model.tied else tensors | {"output_layer.weight": (v, h)}


def of_layer(model: ModelFields) -> Tensors:
    """See :meth:`ModelConfig.layer_parameters`."""
    return _attention(model) | _feed_forward(model)


def _attention(model: ModelFields) -> Tensors:
    h, d = model.hidden_size, model.kv_channels
    tensors = _norm(model, "self_attention.linear_qkv.layer_norm_", h, "input")
    tensors |= _linear("self_attention.linear_qkv", model.qkv_width, h, model.add_qkv_bias)
    if model.qk_layernorm:
        heads = (model.num_attention_heads, model.query_groups) if model.qk_layernorm_across_heads else (1, 1)
        for name, count in zip("qk", heads, strict=True):
            tensors |= _norm(model, f"self_attention.{name}_layernorm.", count * d)
    tensors |= _linear("self_attention.linear_proj", h, model.query_width, model.add_bias_linear)
    if model.augmented_shortcuts:
        tensors["self_attention.augmented_shortcut.down"] = (model.shortcut_width, h)
        tensors["self_attention.augmented_shortcut.up"] = (h, model.shortcut_width)
    return tensors | _norm(model, "self_attention.residual_output.norm.", h, "output")


def _feed_forward(model: ModelFields) -> Tensors:
    h, f = model.hidden_size, model.ffn_hidden_size
    tensors = _norm(model, "mlp.linear_fc1.layer_norm_", h, "input")
    tensors |= _linear("mlp.linear_fc1", (1 + model.gated) * f, h, model.add_bias_linear)
    if model.series_activation_order:
        tensors["mlp.series_activation.scale"] = (model.series_activation_order, f)
        tensors["mlp.series_activation.bias"] = (model.series_activation_order, f)
    tensors |= _linear("mlp.linear_fc2", h, f, model.add_bias_linear)
    return tensors | _norm(model, "mlp.residual_output.norm.", h, "output")


def _norm(model: ModelFields, prefix: str, width: int, place: str | None = None) -> Tensors:
    """The vectors of a norm at ``place``; none if the model has no norm there."""
    if place and model.norm_placement not in (place, "both"):
        return {}
    vectors = ("weight",) if model.normalization == "RMSNorm" else ("weight", "bias")
    return {prefix + vector: (width,) for vector in vectors}


def _linear(name: str, rows: int, columns: int, bias: bool) -> Tensors:
    tensors: Tensors = {f"{name}.weight": (rows, columns)}
    return tensors | {f"{name}.bias": (rows,)} if bias else tensors


def count(model: ModelFields) -> int:
    """See :attr:`ModelConfig.num_parameters`."""
    outside = _numbers(of_model(model, layers=0))
    return outside + model.num_layers * _numbers(of_layer(model))


def _numbers(tensors: Tensors) -> int:
    return sum(map(math.prod, tensors.values()))
