"""Which arguments decide what a model computes: the one table for all who compare or take them."""

from argparse import Namespace
from functools import cache
from typing import Any

from megatron_ext.config import flag_of, options, sections
from megatron_ext.config.dependences import DEPENDENCES
from megatron_ext.config.flags import default_of

#: Flags of the model's sections that leave its function as it is: they say how it starts, is trained or is
#: run, or say again what another flag says. Every other flag of these sections is part of the function.
NOT_THE_FUNCTION = frozenset(
    {
        *("model_preset", "pangu_init", "init_method_std", "embedding_init_method_std"),
        *("attention_dropout", "hidden_dropout", "make_vocab_size_divisible_by"),
        *("round_index", "round_schedule", "record_sample_loss", "record_mode"),
        *("transformer_impl", "attention_backend", "attention_softmax_in_fp32"),
        *("use_mcore_models", "use_flash_attn", "use_rotary_position_embeddings"),
    }
)

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
    model = [option.name for title in ("model", "PanGu-pi") for option in sections()[title]]
    return tuple(name for name in model if name not in NOT_THE_FUNCTION)


def function_of(args: Namespace) -> dict[str, Any]:
    """Name -> value of what decides the model's function; None where it does not matter, or is not known.

    ``args`` may be those of a checkpoint of Megatron-LM. What it does not say has the default: the
    versions without an option computed as its default does.
    """
    values = {name: _stated(args, name, default_of(options()[name])) for name in names()}
    values["add_qkv_bias"] = values["add_qkv_bias"] or values["add_bias_linear"]
    values["rotary_seq_len_interpolation_factor"] = values["rotary_seq_len_interpolation_factor"] or 1
    given = Namespace(**values)
    for dependence in DEPENDENCES:
        idle = [name for name in dependence.names if name in values]
        if idle and not dependence.holds(given):
            values |= dict.fromkeys(idle)
    # As many groups as heads are none; without groups, their number says nothing.
    if not values["group_query_attention"] or values["num_query_groups"] == values["num_attention_heads"]:
        values |= {"group_query_attention": False, "num_query_groups": None}
    if values["position_embedding_type"] != "learned_absolute":
        values["max_position_embeddings"] = None  # rotary positions have no end
    return values


def differences(saved: Namespace, args: Namespace) -> list[str]:
    """What a checkpoint's ``saved`` arguments and ``args`` say differently of the model, flag by flag."""
    theirs, ours = function_of(saved), function_of(args)
    found = [
        f"{spelled(name)}: checkpoint {theirs[name]}, this run {ours[name]}"
        for name in theirs
        if theirs[name] is not None and ours[name] is not None and theirs[name] != ours[name]
    ]
    return found + unknown_here(saved)


def unknown_here(saved: Namespace) -> list[str]:
    """What a checkpoint of Megatron-LM says of its model that no flag here can say."""
    return [
        f"{name} (Megatron-LM's): checkpoint {getattr(saved, name)}, here always {value}"
        for name, value in ALWAYS.items()
        if getattr(saved, name, None) not in (None, value)
    ]


def take(saved: Namespace, args: Namespace, said: set[str], more: tuple[str, ...] = ()) -> list[str]:
    """Set in ``args`` what a checkpoint's ``saved`` arguments say of the model and ``said`` does not.

    Args:
        said: the arguments that a flag, or a preset, gave a value.
        more: arguments to take besides those of the function.
    Returns:
        the names of the arguments that were set.
    """
    said = said.union(*(group for group in TOGETHER if said & {*group}))
    open_ = [name for name in (*names(), *more) if name not in said]
    taken = {name: _stated(saved, name, None) for name in open_}
    taken = {name: value for name, value in taken.items() if value is not None}
    vars(args).update(taken)
    return list(taken)


def _stated(args: Namespace, name: str, default: Any) -> Any:
    """What ``args`` say, under the names of earlier versions of Megatron-LM too."""
    if name == "position_embedding_type" and getattr(args, "use_rotary_position_embeddings", False):
        return "rope"
    earlier = {"layernorm_epsilon": "norm_epsilon"}.get(name, name)
    return getattr(args, name, getattr(args, earlier, default))


def spelled(name: str) -> str:
    """The flag, with the argument's name where the two differ."""
    flag = flag_of(name)
    return flag if flag == "--" + name.replace("_", "-") else f"{flag} ({name})"
