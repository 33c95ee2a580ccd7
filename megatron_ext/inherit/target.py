"""The target model, and the check that it can be sliced from the source."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_ext.config import flag_of
from megatron_ext.config.data import padded
from megatron_ext.config.model import ModelConfig, NoSuchModel
from megatron_ext.config.presets import preset
from megatron_ext.inherit.options import InheritOptions


class InheritanceError(ValueError):
    """The target cannot be made from the source; the message lists all reasons, one per line."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


def target_model(options: InheritOptions, source: ModelConfig, vocab_size: int) -> ModelConfig:
    """The target model: the flags, then the preset, then the source's values.

    Raises:
        InheritanceError: with all reasons why it cannot be sliced from ``source``.
    """
    wanted = _wanted(options)
    heads, groups = wanted.get("num_attention_heads"), wanted.get("num_query_groups")
    share = source.heads_per_group
    if groups is None and heads is not None and heads % share == 0:
        wanted["num_query_groups"] = heads // share
    if heads is None and groups is not None:
        wanted["num_attention_heads"] = groups * share
    if problems := list(_problems(source, wanted)):
        raise InheritanceError(problems)
    wanted |= _ONE_KIND_OF_LAYER | {"softmax_vocab_size": vocab_size, "padded_vocab_size": padded(vocab_size)}
    try:
        return dataclasses.replace(source, **wanted)
    except NoSuchModel as error:
        raise InheritanceError([_in_flags_of_the_tool(problem) for problem in error.problems]) from error


#: Properties of single layers are inherited once it is known which layers are kept.
_ONE_KIND_OF_LAYER: dict[str, Any] = {"no_rope_freq": None, "window_attn_skip_freq": None}


def of_layers(target: ModelConfig, source: ModelConfig, layers: list[int]) -> ModelConfig:
    """The target with the given layers of the source, which keep their rotary embedding and their window."""
    unrotated, windowed = (
        tuple(kind[layer] for layer in layers) for kind in (source.unrotated, source.windowed)
    )
    changes: dict[str, Any] = {
        "no_rope_freq": unrotated if any(unrotated) else None,
        "window_attn_skip_freq": windowed if any(windowed) and not all(windowed) else None,
    }
    if not any(windowed):
        changes |= {"window_size": None, "window_rotary_base": None}
    return dataclasses.replace(target, **changes)


#: The target's fields taken from a preset; position embedding, norms and their epsilon stay the source's.
_OF_A_PRESET = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("untie_embeddings_and_output_weights", "series_activation_order"),
    *("augmented_shortcuts", "augmented_shortcut_reduction"),
)


def _wanted(options: InheritOptions) -> dict[str, Any]:
    """Field of ModelConfig -> value of its flag or preset; without fields that neither sets."""
    wanted: dict[str, Any] = {}
    if options.model_preset:
        try:
            shape = preset(options.model_preset)
        except LookupError as error:
            raise InheritanceError([str(error.args[0])]) from error
        wanted = {name: getattr(shape, name) for name in _OF_A_PRESET}
    if options.untie_embeddings_and_output_weights:
        wanted["untie_embeddings_and_output_weights"] = True
    typed = {
        "num_layers": options.target_num_layers,
        "hidden_size": options.target_hidden_size,
        "ffn_hidden_size": options.target_ffn_hidden_size,
        "num_attention_heads": options.target_num_attention_heads,
        "num_query_groups": options.target_num_query_groups,
        "series_activation_order": options.series_activation_order,
        "augmented_shortcuts": options.augmented_shortcuts,
        "augmented_shortcut_reduction": options.augmented_shortcut_reduction,
    }
    return wanted | {name: value for name, value in typed.items() if value is not None}


#: Field -> the tool's flag.
_FLAGS = {
    "num_layers": "--target-num-layers",
    "hidden_size": "--target-hidden-size",
    "ffn_hidden_size": "--target-ffn-hidden-size",
    "num_query_groups": "--target-num-query-groups",
}


def _in_flags_of_the_tool(problem: str) -> str:
    """Replace the trainer's flags in a sentence of ModelConfig by the tool's."""
    for name, flag in _FLAGS.items():
        problem = problem.replace(f"{flag_of(name)} ", f"{flag} ")
    return problem


def _problems(source: ModelConfig, target: dict[str, Any]) -> Iterator[str]:
    """The reasons why ``target``, with other fields as in ``source``, cannot be sliced from it."""
    have = vars(source) | {"num_query_groups": source.query_groups}
    get = have | target
    for name, flag in _FLAGS.items():
        if get[name] > have[name]:
            yield f"{flag} {get[name]}: the source has only {have[name]}; a target is never larger"
        if get[name] < 1:
            yield f"{flag} {get[name]}: must be at least 1"
    heads, groups, share = get["num_attention_heads"], get["num_query_groups"], source.heads_per_group
    if heads != groups * share:
        yield (
            f"{heads} heads in {groups} query groups: the source has {share} query heads a group, which "
            "inheritance keeps, so the heads must be that many times the groups "
            "(--target-num-attention-heads, --target-num-query-groups)"
        )
    if get["kv_channels"] != source.kv_channels:
        yield (
            f"heads of {get['kv_channels']} channels, but the source's have {source.kv_channels}: a head is "
            "inherited whole, because its channels are rotated in pairs; choose a source or a preset with "
            "the same width of heads"
        )
    if get["series_activation_order"] < source.series_activation_order:
        yield (
            f"--series-activation-order {get['series_activation_order']}: the source's series has "
            f"{source.series_activation_order} terms, which its weights rely on"
        )
    if source.augmented_shortcuts and not get["augmented_shortcuts"]:
        yield "--augmented-shortcuts 0: the source has shortcuts, which its weights rely on"
    if source.untie_embeddings_and_output_weights and not get["untie_embeddings_and_output_weights"]:
        yield "the source's output layer has weights of its own: the target's cannot be tied"
