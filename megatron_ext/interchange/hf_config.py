"""``config.json`` of a Hugging Face folder <-> what a model is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from megatron_ext.config.data import padded
from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.llama import llama_like, require_llama_like
from megatron_ext.interchange.mapping import architecture_named, architecture_of

#: Rotary embeddings that are plain up to max_position_embeddings ("dynamic" stretches beyond it only).
_PLAIN_ROTARY = ("default", "dynamic")
#: The numbers of Llama 3's rotary scaling that Megatron-Core fixes (rotary_pos_embedding.py:_apply_scaling).
_LLAMA3_ROTARY = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
#: Settings without a counterpart here, and the values with which they have no effect.
_WITHOUT_EFFECT = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "bias": (False,),
    "partial_rotary_factor": (1.0, 1),
}
#: What transformers takes for a setting that is not there, where the architectures differ or it matters.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False},
}
_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
_OUR_SIZES = ("series_activation_order", "augmented_shortcuts", "augmented_shortcut_reduction")
_SWITCHES = ("tie_word_embeddings", "qkv_bias", "attention_bias", "use_sliding_window")
#: Far above any model; the sizes of tensors, products of these, stay countable.
_MOST = 1 << 24


def read_model(config: dict[str, Any]) -> ModelConfig:
    """The model that ``config`` describes.

    ``max_position_embeddings`` stops at a sliding window, up to which attention is full. What ``config``
    leaves open is what transformers takes for that architecture.

    Raises:
        InterchangeError: an unknown architecture, missing sizes, or settings that no model here has;
            all of them are named.
    """
    architecture = architecture_named(str(config.get("model_type")))
    config = _DEFAULTS.get(architecture.model_type, {}) | config
    if problems := list(_problems(config, architecture.model_type)):
        raise InterchangeError("; ".join(problems))
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    positions, rotary = config.get("max_position_embeddings") or 2048, _rotary(config)
    scaling: dict[str, Any] = {}
    if rotary["rope_type"] == "llama3":
        scaling = {"use_rope_scaling": True, "rope_scaling_factor": float(rotary["factor"])}
    return llama_like(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        padded_vocab_size=padded(config["vocab_size"]),
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings"),
        add_qkv_bias=architecture.qkv_bias or bool(config.get("qkv_bias")),
        layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
        rotary_base=int(rotary["rope_theta"]),
        max_position_embeddings=min(positions, _window(config) or positions),
        series_activation_order=config.get("series_activation_order", 0),
        augmented_shortcuts=config.get("augmented_shortcuts", 0),
        augmented_shortcut_reduction=config.get("augmented_shortcut_reduction", 32),
        **scaling,
    )


def _problems(config: dict[str, Any], model_type: str) -> Iterator[str]:
    """What keeps ``config`` from being a model here."""
    yield from _wrong_types(config)
    for name, values in _WITHOUT_EFFECT.items():
        if name in config and config[name] not in (*values, None):
            yield f"{name} {config[name]!r} is not supported"
    layers = config.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        yield f"layer_types {layers!r} is not supported"
    if config.get("attention_bias") and model_type != "qwen2":
        yield "attention_bias is not supported: there is no place for the bias of o_proj"
    both = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if wrong := [settings for settings in both if not isinstance(settings, dict)]:
        yield f"rope_parameters or rope_scaling is {wrong[0]!r}, not an object"
    else:
        yield from _rotary_contradictions(config, *both)
        yield from _rotary_problems(_rotary(config))


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
    if not _is_real(epsilon) or not 0 < epsilon < 1:
        yield f"rms_norm_eps is {epsilon!r}, not a number between 0 and 1"


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    """``rope_theta``, ``rope_type`` and what the type needs, from transformers 5's ``rope_parameters`` or the
    older ``rope_theta`` and ``rope_scaling``.
    """
    settings = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    theta = settings.get("rope_theta", config.get("rope_theta"))
    return settings | {
        "rope_type": _rotary_type(settings) or "default",
        "rope_theta": 10000.0 if theta is None else theta,
    }


def _rotary_type(settings: dict[str, Any]) -> object:
    return settings.get("rope_type") or settings.get("type")


def _rotary_contradictions(
    config: dict[str, Any], parameters: dict[str, Any], scaling: dict[str, Any]
) -> Iterator[str]:
    """What the two places of the rotary settings, and the one of the base, say differently."""
    types = {str(kind) for kind in map(_rotary_type, (parameters, scaling)) if kind}
    if len(types) > 1:
        yield f"rope_parameters and rope_scaling differ: {' and '.join(sorted(types))}"
    for name in sorted((parameters.keys() & scaling.keys()) - {"rope_type", "type"}):
        if parameters[name] != scaling[name]:
            values = f"{parameters[name]!r} and {scaling[name]!r}"
            yield f"rope_parameters and rope_scaling differ in {name}: {values}"
    bases = [each.get("rope_theta") for each in (config, parameters, scaling)]
    told = [base for base in bases if base is not None]
    if any(base != told[0] for base in told):
        yield f"rope_theta is said twice and differs: {' and '.join(map(repr, told))}"


def _rotary_problems(rotary: dict[str, Any]) -> Iterator[str]:
    base, kind = rotary["rope_theta"], rotary["rope_type"]
    if kind not in (*_PLAIN_ROTARY, "llama3"):
        known = ", ".join((*_PLAIN_ROTARY, "llama3"))
        yield f"rotary embeddings of type {kind!r} are not supported, only {known}"
    if not _is_real(base) or base != int(base) or not 1 <= base < 2**31:
        yield f"rope_theta {base!r} is not a whole number from 1"
    if rotary.get("partial_rotary_factor") not in (None, 1):
        yield f"partial_rotary_factor {rotary['partial_rotary_factor']!r} is not supported"
    if kind != "llama3":
        return
    for name, fixed in _LLAMA3_ROTARY.items():
        if rotary.get(name) != fixed:
            yield f"{name} {rotary.get(name)!r} of llama3's rotary scaling is not supported, only {fixed:g}"
    if not _is_real(rotary.get("factor")) or not rotary["factor"] >= 1:
        yield f"factor {rotary.get('factor')!r} of llama3's rotary scaling is not a number from 1"


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
    if model.use_rope_scaling and architecture.model_type == "internlm2":
        raise InterchangeError("InternLM2's code does not know llama3's rotary scaling")
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
        "rope_parameters": {**_rotary_scaling(model), "rope_theta": float(model.rotary_base)},
        "rope_theta": float(model.rotary_base),
        "rope_scaling": _rotary_scaling(model) if model.use_rope_scaling else None,
        "tie_word_embeddings": model.tied,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return config | _of_its_own(model, architecture.model_type)


def _rotary_scaling(model: ModelConfig) -> dict[str, Any]:
    """The type of rotary embedding and its numbers."""
    if not model.use_rope_scaling:
        return {"rope_type": "default"}
    return {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA3_ROTARY}


def _of_its_own(model: ModelConfig, model_type: str) -> dict[str, Any]:
    """The settings that only one architecture has."""
    if model_type == "pangu_pi":
        return {
            "qkv_bias": model.add_qkv_bias,
            "series_activation_order": model.series_activation_order,
            "augmented_shortcuts": model.augmented_shortcuts,
            "augmented_shortcut_reduction": model.augmented_shortcut_reduction,
            "auto_map": {
                "AutoConfig": "configuration_pangu_pi.PanguPiConfig",
                "AutoModel": "modeling_pangu_pi.PanguPiModel",
                "AutoModelForCausalLM": "modeling_pangu_pi.PanguPiForCausalLM",
            },
        }
    if model_type == "qwen2":
        return {"use_sliding_window": False}
    if model_type == "mistral":
        return {"sliding_window": None}
    return {"bias": False} if model_type == "internlm2" else {"attention_bias": False, "mlp_bias": False}
