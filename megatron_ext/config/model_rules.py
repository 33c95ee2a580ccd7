"""The rules of :class:`ModelConfig`: the reasons why a model is invalid."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_ext.common.flags import Option, fits, own_options, spelled, wrong
from megatron_ext.config.model_fields import ModelFields

#: Larger than any size of a model: such a value is damaged or mistyped.
_TOO_LARGE = 1 << 31
#: Numbers that are not sizes.
_NO_SIZES = ("rotary_base", "window_rotary_base", "rotary_seq_len_interpolation_factor")
#: The FFN's nonlinearities.
ACTIVATIONS = ("swiglu", "squared_relu", "quick_geglu", "geglu")


def problems(model: ModelFields) -> Iterator[str]:
    """The reasons why the model is invalid; single values first, because the other rules use them."""
    wrong_values = [text for option in own_options(ModelFields) for text in _wrong(model, option)]
    yield from wrong_values
    if not wrong_values:
        for rule in (_heads, _rotation, _per_layer_properties, _ffn, _norms, _vocabulary):
            yield from rule(model)


def _wrong(model: ModelFields, option: Option) -> Iterator[str]:
    """Problems of a value by itself."""
    value = getattr(model, option.name)
    yield from wrong(option, value)
    if value is None and option.name != "kv_channels" and not fits(None, option.annotation):
        yield f"nothing says {option.name}"
    if type(value) is int and value >= _TOO_LARGE and option.name not in _NO_SIZES:
        yield f"{spelled(option)} {value}: no model is as large"


def _heads(model: ModelFields) -> Iterator[str]:
    if not model.kv_channels:
        yield (
            f"--hidden-size {model.hidden_size} is not divisible by --num-attention-heads "
            f"{model.num_attention_heads}; change one, or give --kv-channels"
        )
    if model.group_query_attention and model.num_attention_heads % (model.num_query_groups or 1):
        yield (
            f"--num-attention-heads {model.num_attention_heads} is not divisible by "
            f"--num-query-groups {model.num_query_groups}"
        )
    if model.augmented_shortcuts and model.hidden_size % model.augmented_shortcut_reduction:
        yield (
            f"--hidden-size {model.hidden_size} is not divisible by --augmented-shortcut-reduction "
            f"{model.augmented_shortcut_reduction}"
        )


def _rotation(model: ModelFields) -> Iterator[str]:
    whole = model.position_embedding_type == "rope" and model.rotary_percent == 1
    if whole and (model.kv_channels or 0) % 2:
        yield f"--kv-channels {model.kv_channels}: rotary embeddings turn pairs, give an even number"
    if model.position_embedding_type in ("mrope", "relative"):
        yield (
            f"--position-embedding-type {model.position_embedding_type} is not supported here; "
            "use rope, learned_absolute or none"
        )


def _per_layer_properties(model: ModelFields) -> Iterator[str]:
    for name in ("no_rope_freq", "window_attn_skip_freq"):
        freq, flag = getattr(model, name), f"--{name.replace('_', '-')}"
        if isinstance(freq, int) and freq < 1:
            yield f"{flag} {freq}: must be at least 1"
        if isinstance(freq, tuple) and len(freq) != model.num_layers:
            yield f"{flag} has {len(freq)} entries, but there are {model.num_layers} layers (--num-layers)"
        if isinstance(freq, tuple) and set(freq) - {0, 1}:
            yield f"{flag} {list(freq)}: its entries are 0 and 1"
    if model.window_size is not None and (
        len(model.window_size) != 2 or model.window_size[0] < 0 or model.window_size[1] != 0
    ):
        given = ",".join(map(str, model.window_size))
        yield f"--window-size {given}: give LEFT,0: LEFT tokens before a token, none after it"


def _ffn(model: ModelFields) -> Iterator[str]:
    chosen = [f"--{name.replace('_', '-')}" for name in ACTIVATIONS if getattr(model, name)]
    if len(chosen) > 1:
        yield f"{' and '.join(chosen)} exclude each other"
    if model.series_activation_order and not model.swiglu:
        yield "--series-activation-order acts on the gate of SwiGLU: add --swiglu"


def _norms(model: ModelFields) -> Iterator[str]:
    if model.qk_layernorm and model.qk_layernorm_across_heads and model.normalization != "RMSNorm":
        yield "--qk-layernorm-across-heads is an RMSNorm: add --normalization RMSNorm"


def _vocabulary(model: ModelFields) -> Iterator[str]:
    if (model.padded_vocab_size or math.inf) < (model.softmax_vocab_size or 0):
        yield (
            f"--padded-vocab-size {model.padded_vocab_size}: too few rows for a vocabulary of "
            f"{model.softmax_vocab_size}"
        )
