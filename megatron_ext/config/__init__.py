"""The configuration by concern; ``flags.py`` makes a flag of each field."""

from functools import cache

from megatron_ext.common.flags import Option, own_options, spelled
from megatron_ext.config.run import RunConfig, concerns

__all__ = ["Option", "RunConfig", "flag_of", "options", "sections"]

#: Titles of the sections of ``--help`` that differ from the concern's name.
_TITLES = {
    "init": "initial weights and random numbers",
    "training": "batch, duration and exit",
    "schedule": "learning rate",
    "checkpoint": "checkpoints",
    "parallel": "parallelism",
    "recompute": "recomputation",
    "graphs": "CUDA graphs",
    "fusion": "fused kernels to switch off",
    "process": "processes",
}


@cache
def sections() -> dict[str, list[Option]]:
    """Title -> options of every flag of the program, in the order of ``--help``."""
    return {_TITLES.get(name, name): own_options(kind) for name, kind in concerns().items()}


@cache
def options() -> dict[str, Option]:
    """Destination -> option."""
    return {option.name: option for group in sections().values() for option in group}


def flag_of(name: str) -> str:
    """The first spelling of the flag of ``name``."""
    return spelled(options()[name]) if name in options() else name
