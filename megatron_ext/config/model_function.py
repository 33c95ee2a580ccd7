"""Which arguments decide what a model computes: the one table for all who compare or take them."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron_ext.common.flags import default_of, own_options
from megatron_ext.config import flag_of, options
from megatron_ext.config.model import ModelConfig

#: What a checkpoint says of the run that saved it, by the names of Megatron-LM's arguments.
Saved = Mapping[str, Any]

#: Megatron-LM's arguments that change what a model computes and that have no flag here, with the value
#: that every model here is computed with. A checkpoint that says another is of a model we do not have.
ALWAYS: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "glu_linear_offset": 0.0,
    "heterogeneous_layers_config_encoded_json": None,
    "heterogeneous_layers_config_path": None,
    "hybrid_override_pattern": None,
    "is_hybrid_model": False,
    "layernorm_zero_centered_gamma": False,
    "linear_attention_freq": None,
    "mrope_section": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "num_experts": None,
    "onnx_safe": None,
    "openai_gelu": False,
    "qk_l2_norm": False,
    "rope_type": "rope",
    "rotary_interleaved": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_size": None,
}

#: Flags that say one thing together: where one of them is typed, none is taken from a checkpoint.
TOGETHER = (
    ("swiglu", "squared_relu", "quick_geglu"),
    ("group_query_attention", "num_query_groups"),
    ("position_embedding_type", "use_rotary_position_embeddings"),
)


@cache
def names() -> tuple[str, ...]:
    """The arguments that decide what a model computes, and with it the sizes of its weights."""
    return tuple(option.name for option in own_options(ModelConfig) if option.name != "padded_vocab_size")


def model_of(saved: Saved) -> ModelConfig:
    """The model of a checkpoint, ours or Megatron-LM's, without its vocabulary; a draft, not checked yet.

    What the arguments do not say has the default: versions without an option computed as its default does.
    """
    return ModelConfig.draft(**{name: _stated(saved, name, default_of(options()[name])) for name in names()})


def function_of(saved: Saved) -> dict[str, Any]:
    """Name -> value of what decides the model's function; None where it does not matter, or is not known."""
    return model_of(saved).effective()


def differences(saved: Saved, model: ModelConfig) -> list[str]:
    """What a checkpoint's ``saved`` arguments say differently of the model, flag by flag."""
    theirs, ours = function_of(saved), model.effective()
    found = [
        f"{spelled(name)}: checkpoint {theirs[name]}, this run {ours[name]}"
        for name in names()
        if theirs[name] is not None and ours[name] is not None and theirs[name] != ours[name]
    ]
    return found + unknown_here(saved)


def unknown_here(saved: Saved) -> list[str]:
    """What a checkpoint of Megatron-LM says of its model that no flag here can say."""
    return [
        f"{name} (Megatron-LM's): checkpoint {saved[name]}, here always {value}"
        for name, value in ALWAYS.items()
        if saved.get(name) not in (None, value)
    ]


def taken(saved: Saved, said: set[str], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Name -> value of what a checkpoint's ``saved`` arguments say of the model and ``said`` does not.

    Args:
        said: the arguments that a flag, or a preset, gave a value.
        more: arguments to take besides those of the function.
    """
    said = said.union(*(group for group in TOGETHER if said & {*group}))
    found = {name: _stated(saved, name, None) for name in (*names(), *more) if name not in said}
    return {name: value for name, value in found.items() if value is not None}


def _stated(saved: Saved, name: str, default: Any) -> Any:
    """What is said, under the names of earlier versions of Megatron-LM too."""
    if name == "position_embedding_type" and saved.get("use_rotary_position_embeddings"):
        return "rope"
    earlier = {"layernorm_epsilon": "norm_epsilon"}.get(name, name)
    return saved.get(name, saved.get(earlier, default))


def spelled(name: str) -> str:
    """The flag, with the argument's name where the two differ."""
    flag = flag_of(name)
    return flag if flag == "--" + name.replace("_", "-") else f"{flag} ({name})"
