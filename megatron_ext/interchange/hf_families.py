"""The differences between the ``config.json`` of each architecture and Llama's.

Defaults and names are those of transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange.hf_family import (
    FULL,
    MULTIPLIERS,
    SLIDING,
    Family,
    Settings,
    entries_problems,
    multipliers,
    no_rope,
    no_rope_problems,
    numbers,
    rotated_share,
    share_problems,
    window_problems,
    windows,
    write_multipliers,
    write_no_rope,
    write_windows,
)
from megatron_ext.interchange.hf_rotary import is_real
from megatron_ext.interchange.llama import beyond_plain

_GELU = "gelu_pytorch_tanh"


class Mistral(Family):
    """Its window, on unless it is null, limits the positions."""

    defaults = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": None}


class Qwen2(Family):
    """Its window is off by default."""

    defaults = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False}
    off = ("use_sliding_window",)


class InternLM2(Family):
    """It has its own switch for biases."""

    off = ("bias",)


class Qwen3(Family):
    """As Qwen 2, with heads of 128 channels by default."""

    defaults = {**Qwen2.defaults, "head_dim": 128}
    off = ("use_sliding_window", "attention_bias")


class SmolLM3(Family):
    """Layers without rotary embedding."""

    defaults = {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
    }
    rope_theta = 2_000_000.0
    off = ("use_sliding_window", "attention_bias", "mlp_bias")

    def problems(self, config: Settings) -> Iterator[str]:
        return no_rope_problems(config)

    def read(self, config: Settings) -> dict[str, Any]:
        return no_rope(config)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return super().write(model) | write_no_rope(model)


class Olmo2(Family):
    """Another default epsilon."""

    defaults = {"rms_norm_eps": 1e-5}
    off = ("attention_bias",)


class Phi3(Family):
    """Partial rotation; its window is imported."""

    defaults = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    understands = ("partial_rotary_factor", "sliding_window")

    def problems(self, config: Settings) -> Iterator[str]:
        return share_problems(config)

    def read(self, config: Settings) -> dict[str, Any]:
        return rotated_share(config) | windows(config)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        share = {"partial_rotary_factor": model.rotary_percent}
        rotary = {"rope_type": "default", "rope_theta": float(model.rotary_base), **share}
        window = write_windows(model)["sliding_window"]
        return {"rope_parameters": rotary, "sliding_window": window, **share}


class Granite(Family):
    """Its four multipliers."""

    defaults = {"attention_multiplier": 1.0}

    def problems(self, config: Settings) -> Iterator[str]:
        return numbers(config, tuple(MULTIPLIERS))

    def read(self, config: Settings) -> dict[str, Any]:
        return multipliers(config)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return super().write(model) | write_multipliers(model)


class Gemma3(Family):
    """Local layers, with a window and another rotary base, and global layers."""

    defaults = {
        "tie_word_embeddings": True,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    }
    rope_theta = 1_000_000.0
    understands = ("hidden_act", "layer_types", "sliding_window")

    def problems(self, config: Settings) -> Iterator[str]:
        if config["query_pre_attn_scalar"] is None:
            yield "query_pre_attn_scalar is None, not a number above 0"
        yield from numbers(config, ("query_pre_attn_scalar",))
        if wrong := list(numbers(config, ("sliding_window_pattern",), int)):
            yield from wrong
        else:
            yield from window_problems(self._with_layers(config))
        nested = config.get("rope_parameters")
        if isinstance(nested, dict) and any(not isinstance(value, dict) for value in nested.values()):
            yield f"rope_parameters {str(nested)[:80]} has no object for each of {FULL} and {SLIDING}"
            return
        local = self._local(config)
        base, kind = local["rope_theta"], local["rope_type"]
        if not is_real(base) or base != int(base) or not 1 <= base < 2**31 or kind != "default":
            yield f"rope_type {kind!r} with rope_theta {base!r} is not supported for {SLIDING}"
        for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
            if config.get(name):
                yield f"{name} {config[name]!r} is not supported"
        if config.get("hidden_activation", _GELU) != _GELU:
            yield f"hidden_activation {config['hidden_activation']!r} is not supported"

    def read(self, config: Settings) -> dict[str, Any]:
        found = windows(self._with_layers(config))
        return found | {
            "window_rotary_base": int(self._local(config)["rope_theta"]) if found else None,
            "embedding_multiplier": config["hidden_size"] ** 0.5,
            "softmax_scale": config["query_pre_attn_scalar"] ** -0.5,
        }

    def write(self, model: ModelConfig) -> dict[str, Any]:
        scale = model.softmax_scale or model.kv_channels**-0.5
        local = float(model.window_rotary_base or model.rotary_base)
        bases = {FULL: float(model.rotary_base), SLIDING: local}
        return write_windows(model) | {
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()
            },
            "rope_local_base_freq": local,
            "query_pre_attn_scalar": round(scale**-2),
            "hidden_activation": _GELU,
            "hidden_act": _GELU,
        }

    def rotary(self, config: Settings) -> Settings:
        nested = config.get("rope_parameters")
        return {**config, "rope_parameters": nested.get(FULL)} if isinstance(nested, dict) else config

    @staticmethod
    def _with_layers(config: Settings) -> Settings:
        """With ``layer_types``, derived from the older pattern if missing: every N-th layer is global."""
        if config.get("layer_types") is not None:
            return config
        every, count = config["sliding_window_pattern"], config["num_hidden_layers"]
        return {**config, "layer_types": [SLIDING if (n + 1) % every else FULL for n in range(count)]}

    @staticmethod
    def _local(config: Settings) -> dict[str, Any]:
        """The rotary embedding of local layers, from the new or the old setting."""
        nested, base = config.get("rope_parameters"), config.get("rope_local_base_freq")
        told = {} if base is None else {"rope_theta": base}
        nested = nested.get(SLIDING) or {} if isinstance(nested, dict) else {}
        return {"rope_theta": 10000.0, "rope_type": "default"} | told | nested


class PanguPi(Family):
    """This project's; options have the names of ModelConfig, SmolLM3's or Granite's."""

    understands = ("hidden_act",)
    sizes = ("series_activation_order", "augmented_shortcuts", "augmented_shortcut_reduction")
    switches = ("qk_layernorm", "qk_layernorm_across_heads", "layernorm_zero_centered_gamma")

    def problems(self, config: Settings) -> Iterator[str]:
        yield from no_rope_problems(config)
        yield from numbers(config, ("rotary_percent", "window_rotary_base", *MULTIPLIERS))
        yield from numbers(config, ("window_size",), int)
        yield from entries_problems("windowed_layers", config)
        for name in self.switches:
            if not isinstance(config.get(name), bool | None):
                yield f"{name} is {config[name]!r}, not true or false"
        if config.get("norm_placement", "input") not in ("input", "output", "both"):
            yield f"norm_placement {config['norm_placement']!r} is not input, output or both"
        if config.get("hidden_act", "silu") not in ("silu", _GELU):
            yield f"hidden_act {config['hidden_act']!r} is not supported"
        if config.get("window_size") is not None and config.get("windowed_layers") is None:
            yield "window_size needs windowed_layers, a list of 0 and 1"

    def read(self, config: Settings) -> dict[str, Any]:
        names = (*self.sizes, *self.switches, "norm_placement", "rotary_percent")
        found = {name: config[name] for name in names if config.get(name) is not None}
        found |= {"add_qkv_bias": bool(config.get("qkv_bias")), "geglu": config.get("hidden_act") == _GELU}
        if config.get("window_size") is not None:
            base = config.get("window_rotary_base")
            found |= {
                "window_size": (config["window_size"], 0),
                "window_attn_skip_freq": tuple(config["windowed_layers"]),
                "window_rotary_base": None if base is None else int(base),
            }
        return found | no_rope(config) | multipliers(config)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "qkv_bias": model.add_qkv_bias,
            **{name: getattr(model, name) for name in self.sizes},
            **self._beyond_llama(model),
            "auto_map": {
                "AutoConfig": "configuration_pangu_pi.PanguPiConfig",
                "AutoModel": "modeling_pangu_pi.PanguPiModel",
                "AutoModelForCausalLM": "modeling_pangu_pi.PanguPiForCausalLM",
            },
        }

    def _beyond_llama(self, model: ModelConfig) -> dict[str, Any]:
        """Settings of its options; none for a plain model."""
        has = beyond_plain(model)
        names = (*self.switches, "norm_placement", "rotary_percent", "window_rotary_base")
        found = {name: has[name] for name in names if name in has}
        if "geglu" in has:
            found["hidden_act"] = _GELU
        if "no_rope_freq" in has:
            found |= write_no_rope(model)
        if "window_size" in has:
            found |= {"window_size": has["window_size"][0], "windowed_layers": list(model.windowed)}
        scaled = write_multipliers(model)
        return found | {name: value for name, value in scaled.items() if MULTIPLIERS[name] in has}


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Mistral(),
    "qwen2": Qwen2(),
    "internlm2": InternLM2(),
    "qwen3": Qwen3(),
    "smollm3": SmolLM3(),
    "olmo2": Olmo2(),
    "phi3": Phi3(),
    "granite": Granite(),
    "gemma3_text": Gemma3(),
    "pangu_pi": PanguPi(),
}
