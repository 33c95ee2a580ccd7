"""``config.json`` of a Hugging Face folder <-> what a model is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_ext.config.data import padded
from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange import hf_rotary
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.hf_families import FAMILIES
from megatron_ext.interchange.hf_family import Family
from megatron_ext.interchange.hf_rotary import is_real
from megatron_ext.interchange.llama import llama_like, require_llama_like
from megatron_ext.interchange.mapping import Architecture, architecture_named, architecture_of

#: Settings without a counterpart here, and the values with which they have no effect.
_WITHOUT_EFFECT = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "bias": (False,),
    "partial_rotary_factor": (1.0, 1),
}
_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
_OUR_SIZES = ("series_activation_order", "augmented_shortcuts", "augmented_shortcut_reduction")
_SWITCHES = ("tie_word_embeddings", "qkv_bias", "attention_bias", "use_sliding_window")
#: Far above any model; the sizes of tensors, products of these, stay countable.
_MOST = 1 << 24


def read_model(config: dict[str, Any]) -> ModelConfig:
    """The model that ``config`` describes.

    If an architecture's sliding window is not imported, ``max_position_embeddings`` is limited to it, because
    attention is full up to there. Missing settings have transformers' defaults for the architecture.

    Raises:
        InterchangeError: an unknown architecture, missing sizes, or settings that no model here has;
            all of them are named.
    """
    architecture = architecture_named(str(config.get("model_type")), config.get("architectures"))
    family = FAMILIES[architecture.model_type]
    config = {**family.defaults, **config}
    if problems := list(_problems(config, architecture, family)):
        raise InterchangeError("; ".join(problems))
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    positions = config.get("max_position_embeddings") or 2048
    if "sliding_window" not in family.understands:
        positions = min(positions, _window(config) or positions)
    model = llama_like(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        padded_vocab_size=padded(config["vocab_size"]),
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings"),
        layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
        max_position_embeddings=positions,
        **_read_rotary(config, family),
        **dict(architecture.has) | family.read(config),
    )
    if lacking := architecture.lacks(model):
        raise InterchangeError(f"{architecture.class_name}: {'; '.join(lacking)}")
    return model


def _read_rotary(config: dict[str, Any], family: Family) -> dict[str, Any]:
    rotary = hf_rotary.rotary_of(dict(family.rotary(config)), family.rope_theta)
    scaling: dict[str, Any] = {}
    if rotary["rope_type"] == "llama3":
        scaling = {"use_rope_scaling": True, "rope_scaling_factor": float(rotary["factor"])}
    return {"rotary_base": int(rotary["rope_theta"])} | scaling


def _problems(config: dict[str, Any], architecture: Architecture, family: Family) -> Iterator[str]:
    """What keeps ``config`` from being a model here."""
    wrong = list(_wrong_types(config))
    yield from wrong
    for name, values in _WITHOUT_EFFECT.items():
        if name not in family.understands and config.get(name) not in (*values, None):
            yield f"{name} {config[name]!r} is not supported"
    layers = config.get("layer_types") or []
    full = isinstance(layers, list) and all(layer == "full_attention" for layer in layers)
    if "layer_types" not in family.understands and not full:
        yield f"layer_types {layers!r} is not supported"
    if config.get("attention_bias") and architecture.model_type != "qwen2":
        yield "attention_bias is not supported: there is no place for the bias of o_proj"
    if not wrong:
        yield from family.problems(config)
    yield from _rotary_problems(config, family)


def _rotary_problems(config: dict[str, Any], family: Family) -> Iterator[str]:
    own = dict(family.rotary(config))
    both = hf_rotary.settings_of(own)
    if wrong := [settings for settings in both if not isinstance(settings, dict)]:
        yield f"rope_parameters or rope_scaling is {wrong[0]!r}, not an object"
        return
    yield from hf_rotary.contradictions(own, *both)
    rotary = hf_rotary.rotary_of(own, family.rope_theta)
    yield from hf_rotary.problems(rotary)
    share = rotary.get("partial_rotary_factor")
    if "partial_rotary_factor" not in family.understands and share not in (None, 1):
        yield f"partial_rotary_factor {share!r} is not supported"


def _wrong_types(config: dict[str, Any]) -> Iterator[str]:
    """Settings that are no numbers, or numbers that no model has."""
    for name in (*_NEEDED, *_MAY_BE_NULL, *_OUR_SIZES):
        value = config.get(name) if name in (*_NEEDED, *_MAY_BE_NULL) else config.get(name, 1)
        least = 0 if name in ("series_activation_order", "augmented_shortcuts") else 1
        if value is None and name in _MAY_BE_NULL:
            continue
        if type(value) is not int:
            yield f"{name} is {value!r}, not a number"
        elif not least <= value <= _MOST:
            yield f"{name} is {value}, it must be from {least} to {_MOST}"
    for name in _SWITCHES:
        if not isinstance(config.get(name), bool | None):
            yield f"{name} is {config[name]!r}, not true or false"
    epsilon = config.get("rms_norm_eps", 1e-6)
    if not is_real(epsilon) or not 0 < epsilon < 1:
        yield f"rms_norm_eps is {epsilon!r}, not a number between 0 and 1"


def _window(config: dict[str, Any]) -> int | None:
    """The sliding window of a model that slides one."""
    return config.get("sliding_window") if config.get("use_sliding_window") is not False else None


def write_config(model: ModelConfig, dtype: torch.dtype, model_type: str | None = None) -> dict[str, Any]:
    """``config.json`` of ``model`` as the architecture of that ``model_type``, the plainest by default.

    Raises InterchangeError if the model is not Llama-like, or the architecture has no place for it.
    """
    require_llama_like(model)
    architecture = architecture_named(model_type) if model_type else architecture_of(model)
    for _ in architecture.entries_of(model):
        pass  # raises where the architecture has no place for a tensor
    if lacking := architecture.lacks(model):
        raise InterchangeError(f"{architecture.class_name}: {'; '.join(lacking)}")
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        # The first is read by transformers 5, the other two by everything older.
        "rope_parameters": {**hf_rotary.scaling_of(model), "rope_theta": float(model.rotary_base)},
        "rope_theta": float(model.rotary_base),
        "rope_scaling": hf_rotary.scaling_of(model) if model.use_rope_scaling else None,
        "tie_word_embeddings": model.tied,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return config | FAMILIES[architecture.model_type].write(model)
