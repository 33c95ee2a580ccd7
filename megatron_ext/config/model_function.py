"""The arguments that define a model's function, for all code that compares or adopts them."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron_ext.common.flags import default_of, own_options
from megatron_ext.config import flag_of, options
from megatron_ext.config.model import ModelConfig

#: The saved arguments of a checkpoint, by Megatron-LM's names.
Saved = Mapping[str, Any]

#: Megatron-LM's arguments that change a model's function and have no flag here, with the value that applies
#: to every model here. A checkpoint with another value is of an unsupported model.
ALWAYS: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "glu_linear_offset": 0.0,
    "heterogeneous_layers_config_encoded_json": None,
    "heterogeneous_layers_config_path": None,
    "hybrid_override_pattern": None,
    "is_hybrid_model": False,
    "linear_attention_freq": None,
    "mrope_section": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "num_experts": None,
    "onnx_safe": None,
    "openai_gelu": False,
    "qk_l2_norm": False,
    "rope_type": "rope",
    "rotary_interleaved": False,
    "softmax_type": "vanilla",
}

#: Groups of related flags: if one of a group is given, none of it is taken from a checkpoint.
TOGETHER = (
    ("swiglu", "squared_relu", "quick_geglu", "geglu"),
    ("group_query_attention", "num_query_groups"),
    ("position_embedding_type", "use_rotary_position_embeddings"),
)


#: Arguments that Megatron-LM's versions name otherwise.
_SPELLED_OTHERWISE = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
}


@cache
def names() -> tuple[str, ...]:
    """The arguments that define a model's function, and with it the sizes of its weights."""
    return tuple(option.name for option in own_options(ModelConfig) if option.name != "padded_vocab_size")


def model_of(saved: Saved) -> ModelConfig:
    """The model of a checkpoint, ours or Megatron-LM's, without its vocabulary; a draft, not validated yet.

    Missing arguments have their default: versions without an option computed what its default computes.
    """
    return ModelConfig.draft(**{name: _stated(saved, name, default_of(options()[name])) for name in names()})


def function_of(saved: Saved) -> dict[str, Any]:
    """Name -> value of the fields that define the model's function; None if without effect or unknown."""
    return model_of(saved).effective()


def differences(saved: Saved, model: ModelConfig) -> list[str]:
    """The differences between a checkpoint's ``saved`` arguments and ``model``, flag by flag."""
    theirs, ours = function_of(saved), model.effective()
    differing = [
        f"{spelled(name)}: checkpoint {theirs[name]}, this run {ours[name]}"
        for name in names()
        if theirs[name] is not None and ours[name] is not None and theirs[name] != ours[name]
    ]
    return differing + unsupported(saved)


def unsupported(saved: Saved) -> list[str]:
    """The properties of a Megatron-LM checkpoint's model that have no flag here."""
    return [
        f"{name} (Megatron-LM's): checkpoint {saved[name]}, here always {value}"
        for name, value in ALWAYS.items()
        if saved.get(name) not in (None, value)
    ]


def taken(saved: Saved, given: set[str], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Name -> value of the model's arguments to take from a checkpoint: those that are not ``given``.

    Args:
        given: the arguments that a flag or a preset sets.
        more: arguments to take besides those of the model's function.
    """
    given = given.union(*(group for group in TOGETHER if given & {*group}))
    values = {name: _stated(saved, name, None) for name in (*names(), *more) if name not in given}
    return {name: value for name, value in values.items() if value is not None}


def _stated(saved: Saved, name: str, default: Any) -> Any:
    """The saved value, also under the names of earlier versions of Megatron-LM."""
    if name == "position_embedding_type" and saved.get("use_rotary_position_embeddings"):
        return "rope"
    return saved.get(name, saved.get(_SPELLED_OTHERWISE.get(name, name), default))


def spelled(name: str) -> str:
    """The flag, with the argument's name if the two differ."""
    flag = flag_of(name)
    return flag if flag == "--" + name.replace("_", "-") else f"{flag} ({name})"
