"""The shape of the target model, and whether it can be cut out of the source."""

import dataclasses
from argparse import Namespace
from collections.abc import Iterator

from megatron_ext.config.presets import preset_values
from megatron_ext.inherit.axes import heads_per_group
from megatron_ext.interchange.shape import ModelShape, padded


class InheritanceError(ValueError):
    """The target cannot be made of the source; the message has every reason, one a line."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


def target_shape(options: Namespace, source: ModelShape, vocab_size: int) -> ModelShape:
    """The target that the flags ask for: a preset, over it what is typed, the rest as in the source.

    Raises:
        InheritanceError: with every reason why it cannot be cut out of ``source``.
    """
    wanted = _wanted(options)
    heads, groups = wanted.get("num_attention_heads"), wanted.get("num_query_groups")
    share = heads_per_group(source)
    if groups is None and heads is not None and heads % share == 0:
        wanted["num_query_groups"] = heads // share
    if heads is None and groups is not None:
        wanted["num_attention_heads"] = groups * share
    changes = wanted | {"vocab_size": vocab_size, "padded_vocab_size": padded(vocab_size)}
    problems = list(_problems(source, changes))
    if not problems:
        try:
            return dataclasses.replace(source, **changes)
        except ValueError as error:
            problems = [str(error)]
    raise InheritanceError(problems)


def _wanted(options: Namespace) -> dict[str, int | bool]:
    """Field of ModelShape -> what the flags say; a field that none says is not there."""
    wanted: dict[str, int | bool] = {}
    if options.model_preset:
        try:
            flags = preset_values(options.model_preset)
        except LookupError as error:
            raise InheritanceError([str(error.args[0])]) from error
        names = {field.name for field in dataclasses.fields(ModelShape)} - {"max_position_embeddings"}
        wanted = {name: value for name, value in flags.items() if name in names}
        wanted["kv_channels"] = flags["hidden_size"] // flags["num_attention_heads"]
    if options.model_preset or options.untie_embeddings_and_output_weights:
        wanted["tied"] = False
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


_FLAGS = {
    "num_layers": "--target-num-layers",
    "hidden_size": "--target-hidden-size",
    "ffn_hidden_size": "--target-ffn-hidden-size",
    "num_query_groups": "--target-num-query-groups",
}


def _problems(source: ModelShape, target: dict[str, int | bool]) -> Iterator[str]:
    """Why a model with ``target``'s fields, the others as in ``source``, is no part of it."""
    get = vars(source) | target
    for name, flag in _FLAGS.items():
        if get[name] > vars(source)[name]:
            yield f"{flag} {get[name]}: the source has only {vars(source)[name]}; a target is never larger"
        if get[name] < 1:
            yield f"{flag} {get[name]}: must be at least 1"
    heads, groups, share = get["num_attention_heads"], get["num_query_groups"], heads_per_group(source)
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
    if get["tied"] and not source.tied:
        yield "the source's output layer has weights of its own: the target's cannot be tied"
