"""Settings of ``config.json`` shared by several architectures: read, validated and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange.hf_rotary import is_real

Settings = Mapping[str, Any]
#: Kinds of layers: attention with a window, and without.
SLIDING, FULL = "sliding_attention", "full_attention"


class Family:
    """How one architecture's ``config.json`` differs from the common settings; Llama's does not.

    Attributes:
        defaults: transformers' defaults of missing settings.
        rope_theta: the default base of the rotary embedding.
        understands: common settings that this architecture reads itself.
        off: switches that are written as false.
    """

    defaults: Settings = {}
    rope_theta: float = 10000.0
    understands: tuple[str, ...] = ()
    off: tuple[str, ...] = ("attention_bias", "mlp_bias")

    def problems(self, config: Settings) -> Iterator[str]:
        """Problems of its own settings."""
        yield from ()

    def read(self, config: Settings) -> dict[str, Any]:
        """Valid settings -> fields of ModelConfig."""
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """A model -> its own settings, which override the common ones."""
        return dict.fromkeys(self.off, False)

    def rotary(self, config: Settings) -> Settings:
        """The settings that hold the rotary embedding of layers without a window."""
        return config


# ------------------------------------------------------------------ layers of several kinds


def no_rope(config: Settings) -> dict[str, Any]:
    """SmolLM3's list has a 1 for each layer with rotary embedding."""
    layers, rotated = config["num_hidden_layers"], config.get("no_rope_layers")
    if rotated is None and config.get("no_rope_layer_interval"):
        rotated = [int((layer + 1) % config["no_rope_layer_interval"] != 0) for layer in range(layers)]
    without = tuple(1 - int(one) for one in (rotated or [1] * layers)[:layers])
    return {"no_rope_freq": without if any(without) else None}


def no_rope_problems(config: Settings) -> Iterator[str]:
    """Problems of ``no_rope_layers``."""
    yield from entries_problems("no_rope_layers", config)
    yield from numbers(config, ("no_rope_layer_interval",), int)


def entries_problems(name: str, config: Settings) -> Iterator[str]:
    """Problems of an optional list of 0 and 1 with an entry for each layer."""
    found, layers = config.get(name), config["num_hidden_layers"]
    if found is not None and not (
        isinstance(found, list) and len(found) == layers and all(entry in (0, 1) for entry in found)
    ):
        yield f"{name} {str(found)[:40]} is not a list of 0 and 1, one for each of {layers} layers"


def write_no_rope(model: ModelConfig) -> dict[str, Any]:
    """SmolLM3's list."""
    return {"no_rope_layers": [1 - without for without in model.unrotated]}


def windows(config: Settings) -> dict[str, Any]:
    """The window includes the token itself in transformers, but not in Megatron-Core."""
    kinds, window = config.get("layer_types"), config.get("sliding_window")
    if window is None or (kinds is not None and SLIDING not in kinds):
        return {}
    windowed = kinds and tuple(int(kind == SLIDING) for kind in kinds)
    return {
        "window_size": (window - 1, 0),
        "window_attn_skip_freq": windowed if windowed and not all(windowed) else None,
    }


def window_problems(config: Settings) -> Iterator[str]:
    """Problems of ``layer_types``."""
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if kinds is not None and not (
        isinstance(kinds, list) and len(kinds) == layers and all(kind in (SLIDING, FULL) for kind in kinds)
    ):
        yield (
            f"layer_types {str(kinds)[:60]} is not supported, only {SLIDING} and {FULL}, "
            f"one for each of {layers} layers"
        )


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """The window, and which layers have it."""
    kinds = [SLIDING if windowed else FULL for windowed in model.windowed]
    return {"sliding_window": model.window_size and model.window_size[0] + 1, "layer_types": kinds}


# ------------------------------------------------------------------ multipliers, shares


#: Granite's name -> ours.
MULTIPLIERS = {
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logits_scaling": "logits_scaling",
    "attention_multiplier": "softmax_scale",
}


def numbers(config: Settings, names: tuple[str, ...], kind: type = float) -> Iterator[str]:
    """Problems of optional settings that must be numbers above 0."""
    for name in names:
        value = config.get(name)
        if value is not None and not (is_real(value) and value > 0 and (kind is float or type(value) is int)):
            yield f"{name} is {value!r}, not {'a number' if kind is float else 'an integer'} above 0"


def multipliers(config: Settings) -> dict[str, Any]:
    """Granite's four."""
    return {ours: float(config[name]) for name, ours in MULTIPLIERS.items() if config.get(name) is not None}


def write_multipliers(model: ModelConfig) -> dict[str, Any]:
    """Granite's four."""
    scale = model.softmax_scale or model.kv_channels**-0.5
    return {name: getattr(model, ours) for name, ours in MULTIPLIERS.items()} | {
        "attention_multiplier": scale
    }


def rotated_share(config: Settings) -> dict[str, Any]:
    """The fraction of a head's channels that is rotated."""
    return {"rotary_percent": float(next(iter(_shares(config)), 1.0))}


def _shares(config: Settings) -> set[Any]:
    """All values of ``partial_rotary_factor``, which has several places."""
    places = [config, *(config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))]
    found = [place.get("partial_rotary_factor") for place in places if isinstance(place, dict)]
    return {share if is_real(share) else str(share) for share in found if share is not None}


def share_problems(config: Settings) -> Iterator[str]:
    """Problems of ``partial_rotary_factor``."""
    shares = _shares(config)
    if len(shares) > 1:
        yield f"partial_rotary_factor is said twice and differs: {' and '.join(sorted(map(str, shares)))}"
    for share in shares:
        width = config.get("head_dim") or (config.get("hidden_size") or 0) // (
            config["num_attention_heads"] or 1
        )
        if not is_real(share) or not 0 < share <= 1 or int(width * share) % 2:
            yield f"partial_rotary_factor {share!r} is not a share of the head's {width} channels, in pairs"
