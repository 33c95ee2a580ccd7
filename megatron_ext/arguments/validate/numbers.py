"""Rules on required sizes and on the ranges of numbers."""

from megatron_ext.arguments.validate.rule import Problems, Typed
from megatron_ext.common.flags import wrong
from megatron_ext.config import RunConfig, flag_of, options
from megatron_ext.config.presets import PRESETS

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings")


def missing(run: RunConfig) -> list[str]:
    """The required sizes that neither a flag nor a preset sets."""
    return [name for name in (*REQUIRED, "micro_batch_size") if run.get(name) is None]


def sizes_are_given(run: RunConfig, typed: Typed) -> Problems:
    if run.init.model_preset not in (None, *PRESETS):
        return  # already reported, and the reason for the missing sizes
    for name in missing(run):
        preset = ", or a --model-preset that sets it" if name in REQUIRED else ""
        yield f"{flag_of(name)} is required{preset}"


def values_are_possible(run: RunConfig, typed: Typed) -> Problems:
    for name, option in options().items():
        yield from wrong(option, run.get(name))


RULES = (sizes_are_given, values_are_possible)
