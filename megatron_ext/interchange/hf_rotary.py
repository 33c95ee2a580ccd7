"""The rotary embedding in ``config.json``: its base, its type, and what the type needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megatron_ext.config.model import ModelConfig

#: Rotary embeddings that are plain up to max_position_embeddings ("dynamic" stretches beyond it only).
_PLAIN = ("default", "dynamic")
#: The numbers of Llama 3's rotary scaling that Megatron-Core fixes (rotary_pos_embedding.py:_apply_scaling).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def is_real(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def settings_of(config: dict[str, Any]) -> list[Any]:
    """The two places of the rotary settings: transformers 5's and the older one."""
    return [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]


def rotary_of(config: dict[str, Any], base: float = 10000.0) -> dict[str, Any]:
    """``rope_theta``, ``rope_type`` and what the type needs, from transformers 5's ``rope_parameters`` or the
    older ``rope_theta`` and ``rope_scaling``; ``base`` where they do not say one.
    """
    settings = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    theta = settings.get("rope_theta", config.get("rope_theta"))
    return settings | {
        "rope_type": _rotary_type(settings) or "default",
        "rope_theta": base if theta is None else theta,
    }


def _rotary_type(settings: dict[str, Any]) -> object:
    return settings.get("rope_type") or settings.get("type")


def contradictions(
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


def problems(rotary: dict[str, Any]) -> Iterator[str]:
    """Problems of the settings of :func:`rotary_of`."""
    base, kind = rotary["rope_theta"], rotary["rope_type"]
    if kind not in (*_PLAIN, "llama3"):
        known = ", ".join((*_PLAIN, "llama3"))
        yield f"rotary embeddings of type {kind!r} are not supported, only {known}"
    if not is_real(base) or base != int(base) or not 1 <= base < 2**31:
        yield f"rope_theta {base!r} is not a whole number from 1"
    if kind != "llama3":
        return
    for name, fixed in _LLAMA3.items():
        if rotary.get(name) != fixed:
            yield f"{name} {rotary.get(name)!r} of llama3's rotary scaling is not supported, only {fixed:g}"
    if not is_real(rotary.get("factor")) or not rotary["factor"] >= 1:
        yield f"factor {rotary.get('factor')!r} of llama3's rotary scaling is not a number from 1"


def scaling_of(model: ModelConfig) -> dict[str, Any]:
    """The type of rotary embedding and its numbers."""
    if not model.use_rope_scaling:
        return {"rope_type": "default"}
    return {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA3}
