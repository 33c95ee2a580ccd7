"""What is exchanged: Llama-like models, with or without the PanGu-pi modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_ext.config import model_function
from megatron_ext.config.model import ModelConfig, NoSuchModel
from megatron_ext.config.model_function import Saved
from megatron_ext.interchange.errors import InterchangeError

#: Arguments of the model's function with a fixed value in all exchanged models.
LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "squared_relu": False,
    "quick_geglu": False,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_seq_len_interpolation_factor": 1,
}
#: Options of the exchanged architectures -> their value in a plain Llama.
PLAIN: dict[str, Any] = {
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "qk_layernorm_across_heads": False,
    "norm_placement": "input",
    "layernorm_zero_centered_gamma": False,
    "swiglu": True,
    "geglu": False,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_percent": 1.0,
    "no_rope_freq": None,
    "window_size": None,
    "window_attn_skip_freq": None,
    "window_rotary_base": None,
    "softmax_scale": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "series_activation_order": 0,
    "augmented_shortcuts": 0,
}


def beyond_plain(model: ModelConfig) -> dict[str, Any]:
    """Name -> value of the options of :data:`PLAIN` in which ``model`` differs from a Llama."""
    function = model.effective()
    plain = dataclasses.replace(model, **PLAIN).effective()
    return {
        name: getattr(model, name)
        for name, value in PLAIN.items()
        if getattr(model, name) != value and function[name] != plain[name]
    }


def llama_like(*, vocab_size: int, **values: Any) -> ModelConfig:
    """The Llama-like model of these values; what has one value in all of them is filled in.

    Args:
        vocab_size: rows of the vocabulary without padding.
        values: fields of :class:`ModelConfig`; ``num_query_groups`` may be the number of heads.

    Raises:
        InterchangeError: there is no such model, or a value is None; with every reason.
    """
    if unsaid := [name for name, value in values.items() if value is None and PLAIN.get(name, 0) is not None]:
        raise InterchangeError(f"no such model: nothing says {', '.join(unsaid)}")
    if not values.get("augmented_shortcuts"):
        values.pop("augmented_shortcut_reduction", None)  # of no shortcut, whatever the files say
    # A factor of None, the default, is the same as 1.
    always = LLAMA | {"rotary_seq_len_interpolation_factor": None, "swiglu": not values.get("geglu")}
    try:
        return ModelConfig(**always | values, group_query_attention=True, softmax_vocab_size=vocab_size)
    except NoSuchModel as error:
        raise InterchangeError(str(error)) from error


def of_saved(saved: Saved, vocab_size: int) -> ModelConfig:
    """The model that a checkpoint's arguments describe, ours or Megatron-LM's.

    Raises:
        InterchangeError: it is not Llama-like, or there is no such model; with every reason.
        KeyError, TypeError: the arguments do not say what it is.
    """
    model = model_function.model_of(saved)
    _require_llama(model.effective(), model_function.unsupported(saved))
    vocabulary = {
        "softmax_vocab_size": vocab_size,
        "padded_vocab_size": max(saved["padded_vocab_size"], vocab_size),
    }
    groups = {"group_query_attention": True, "num_query_groups": model.query_groups}
    try:
        return ModelConfig(**vars(model) | vocabulary | groups)
    except NoSuchModel as error:
        raise InterchangeError(str(error)) from error


def require_llama_like(model: ModelConfig) -> None:
    """Raise InterchangeError, with every reason, for a model of another kind."""
    _require_llama(model.effective(), [])


def _require_llama(function: Mapping[str, Any], more: list[str]) -> None:
    problems = [
        f"{name} is {function[name]}, not {value}"
        for name, value in LLAMA.items()
        if function[name] not in (value, None)
    ]
    if not function["swiglu"] and not function["geglu"]:
        problems.append("swiglu is False, not True")
    if problems + more:
        raise InterchangeError(f"only Llama-like models can be exchanged: {'; '.join(problems + more)}")
