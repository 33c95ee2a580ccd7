"""Which tensors of a Hugging Face folder make which tensor of ours: one table, read both ways.

An entry names our tensor (Megatron-LM's checkpoint name, unsharded), those of the other side, and how
they lie in ours (``layouts.py``). ``{}`` stands for the layer. InternLM2's fused ``wqkv`` has Megatron's
interleaving already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.config import flag_of
from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.layouts import FusedGroups, Groups, Same, Stack
from megatron_ext.interchange.llama import PLAIN, beyond_plain


@dataclass(frozen=True)
class Entry:
    """One line of the table; ``layer`` fills the ``{}`` of the names."""

    ours: str
    theirs: tuple[str, ...]
    layout: type[Same] = Same
    layer: int | None = None

    def at(self, layer: int) -> Entry:
        """The entry of one layer."""
        names = tuple(name.format(layer) for name in self.theirs)
        return Entry(self.ours.format(layer), names, self.layout, layer)


def _in_layer(ours: str, *theirs: str, layout: type[Same] = Same) -> Entry:
    return Entry(f"decoder.layers.{{}}.{ours}", tuple(f"model.layers.{{}}.{name}" for name in theirs), layout)


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv")


def _replaced(table: tuple[Entry, ...], *changed: Entry) -> tuple[Entry, ...]:
    """The table with the entries of some tensors replaced."""
    named = {entry.ours for entry in changed}
    return (*(entry for entry in table if entry.ours not in named), *changed)


_LLAMA = (
    Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    _in_layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    _in_layer("self_attention.linear_qkv.weight", *_qkv("weight"), layout=Groups),
    _in_layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    _in_layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    _in_layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", layout=Stack),
    _in_layer("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Entry("output_layer.weight", ("lm_head.weight",)),
)
_QKV_BIAS = (_in_layer("self_attention.linear_qkv.bias", *_qkv("bias"), layout=Groups),)
_PI = (
    _in_layer("self_attention.augmented_shortcut.down", "self_attn.augmented_shortcut.down_proj.weight"),
    _in_layer("self_attention.augmented_shortcut.up", "self_attn.augmented_shortcut.up_proj.weight"),
    _in_layer("mlp.series_activation.scale", "mlp.series_activation.scale"),
    _in_layer("mlp.series_activation.bias", "mlp.series_activation.bias"),
)
_PI_NORMS = (
    _in_layer("self_attention.residual_output.norm.weight", "self_attn.output.norm.weight"),
    _in_layer("mlp.residual_output.norm.weight", "mlp.output.norm.weight"),
)
_INTERNLM2 = (
    Entry("embedding.word_embeddings.weight", ("model.tok_embeddings.weight",)),
    _in_layer("self_attention.linear_qkv.layer_norm_weight", "attention_norm.weight"),
    _in_layer("self_attention.linear_qkv.weight", "attention.wqkv.weight"),
    _in_layer("self_attention.linear_proj.weight", "attention.wo.weight"),
    _in_layer("mlp.linear_fc1.layer_norm_weight", "ffn_norm.weight"),
    _in_layer("mlp.linear_fc1.weight", "feed_forward.w1.weight", "feed_forward.w3.weight", layout=Stack),
    _in_layer("mlp.linear_fc2.weight", "feed_forward.w2.weight"),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Entry("output_layer.weight", ("output.weight",)),
)
_QK_NORMS = tuple(
    _in_layer(f"self_attention.{name}_layernorm.weight", f"self_attn.{name}_norm.weight") for name in "qk"
)
_OUTPUT_NORMS = (
    _in_layer("self_attention.residual_output.norm.weight", "post_attention_layernorm.weight"),
    _in_layer("mlp.residual_output.norm.weight", "post_feedforward_layernorm.weight"),
)
_PHI3 = _replaced(
    _LLAMA,
    _in_layer("self_attention.linear_qkv.weight", "self_attn.qkv_proj.weight", layout=FusedGroups),
    _in_layer("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight"),
)
_SANDWICH = _replaced(
    _LLAMA + _QK_NORMS + _OUTPUT_NORMS,
    _in_layer("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm.weight"),
)


@dataclass(frozen=True)
class Architecture:
    """A Hugging Face architecture: its names, its table of tensors, and its options.

    ``has`` and ``may_have`` name options of :data:`llama.PLAIN`.
    """

    model_type: str
    class_name: str
    entries: tuple[Entry, ...]
    has: Mapping[str, Any] = field(default_factory=dict)
    """Options with a fixed value in this architecture."""

    may_have: tuple[str, ...] = ()
    """Options that its ``config.json`` can set."""

    scales_embedding: bool = False
    """Whether it always multiplies the word embeddings by sqrt(h)."""

    def lacks(self, model: ModelConfig) -> list[str]:
        """The reasons why ``model`` cannot be of this architecture."""
        options = beyond_plain(model)
        found = [f"it has no {flag_of(name)}" for name in options if name not in (*self.has, *self.may_have)]
        if self.scales_embedding and model.embedding_multiplier != model.hidden_size**0.5:
            found.append(f"it always has --embedding-multiplier {model.hidden_size**0.5}")
        return found + [
            f"it always has {flag_of(name)} {value}"
            for name, value in self.has.items()
            if options.get(name, PLAIN[name]) != value
        ]

    def entries_of(self, model: ModelConfig) -> Iterator[Entry]:
        """The entries of every tensor that ``model`` has, in the order of the forward pass.

        Raises InterchangeError if this kind of model has no place for one.
        """
        if self.has.get("add_qkv_bias") and not model.add_qkv_bias:
            raise InterchangeError(f"a {self.class_name} has biases that this model lacks")
        table = {entry.ours: entry for entry in self.entries}
        for name in model.parameters():
            prefix, layer, rest = _parts(name)
            entry = table.get(f"{prefix}{{}}{rest}" if layer is not None else name)
            if entry is None:
                raise InterchangeError(f"a {self.class_name} has no place for {name}")
            yield entry if layer is None else entry.at(layer)


def _parts(name: str) -> tuple[str, int | None, str]:
    """``decoder.layers.3.mlp.x`` -> ("decoder.layers.", 3, ".mlp.x")."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name, None, ""
    number, rest = name.removeprefix(prefix).split(".", 1)
    return prefix, int(number), f".{rest}"


_PANGU_PI = _LLAMA + _QKV_BIAS + _PI + _QK_NORMS + _PI_NORMS
_SCALED = ("use_rope_scaling", "rope_scaling_factor")
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "softmax_scale")
_OLMO2 = {"qk_layernorm": True, "qk_layernorm_across_heads": True, "norm_placement": "output"}
_GEMMA3: dict[str, Any] = {
    "qk_layernorm": True,
    "norm_placement": "both",
    "layernorm_zero_centered_gamma": True,
    "swiglu": False,
    "geglu": True,
}
_WINDOW = ("window_size", "window_attn_skip_freq", "window_rotary_base")

#: In the order in which an export tries them.
ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", "LlamaForCausalLM", _LLAMA, {}, _SCALED),
        Architecture("mistral", "MistralForCausalLM", _LLAMA, {}, _SCALED),
        Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA + _QKV_BIAS, {"add_qkv_bias": True}, _SCALED),
        Architecture("internlm2", "InternLM2ForCausalLM", _INTERNLM2),
        Architecture("qwen3", "Qwen3ForCausalLM", _LLAMA + _QK_NORMS, {"qk_layernorm": True}, _SCALED),
        Architecture("smollm3", "SmolLM3ForCausalLM", _LLAMA, {}, ("no_rope_freq", *_SCALED)),
        Architecture("olmo2", "Olmo2ForCausalLM", _LLAMA + _QK_NORMS + _OUTPUT_NORMS, _OLMO2, _SCALED),
        Architecture("phi3", "Phi3ForCausalLM", _PHI3, {}, ("rotary_percent", "window_size")),
        Architecture("granite", "GraniteForCausalLM", _LLAMA, {}, (*_MULTIPLIERS, *_SCALED)),
        Architecture(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _SANDWICH,
            _GEMMA3,
            (*_WINDOW, "embedding_multiplier", "softmax_scale"),
            scales_embedding=True,
        ),
        Architecture("pangu_pi", "PanguPiForCausalLM", _PANGU_PI, {}, tuple(PLAIN)),
    )
}


def architecture_of(model: ModelConfig) -> Architecture:
    """The first architecture that can be ``model``.

    Raises InterchangeError, with the reasons of the last one, if there is none.
    """
    for architecture in ARCHITECTURES.values():
        if not (lacking := architecture.lacks(model)):
            return architecture
    raise InterchangeError(f"no architecture can say what this model is: {'; '.join(lacking)}")


def architecture_named(model_type: str, class_names: object = ()) -> Architecture:
    """The architecture of that ``model_type``.

    Raises InterchangeError with a list of the known ones, and with what to change if the folder's
    ``architectures`` (``class_names``) name the class of a known one.
    """
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    message = f"unknown architecture {model_type!r}; known are {', '.join(ARCHITECTURES)}"
    claimed = class_names if isinstance(class_names, list) else []
    for known in ARCHITECTURES.values():
        if known.class_name in claimed:
            message += (
                f". Its architectures say {known.class_name}: if it computes as one, set model_type to "
                f"{known.model_type!r} in config.json"
            )
    raise InterchangeError(message)
