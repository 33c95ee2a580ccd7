"""Transformer Engine: whether it can be used here, and what each of its FP8 recipes needs."""

import importlib.util
import re
from functools import cache

#: The oldest version that every part Megatron-Core 0.16 builds here runs with.
OLDEST = (2, 0)
INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"

#: Recipe -> (oldest version, least compute capability, its GPUs, rows and columns are multiples of).
#: Versions: megatron/core/fp8_utils.py:get_fp8_recipe. Multiples: Transformer Engine's
#: assert_dim_for_fp8_exec for scaling by tensor, and its quantizers' blocks for the others.
RECIPES = {
    "delayed": ((2, 0), (8, 9), "Ada, Hopper or newer", (8, 16)),
    "tensorwise": ((2, 2), (8, 9), "Ada, Hopper or newer", (8, 16)),
    "blockwise": ((2, 3), (9, 0), "Hopper or newer", (128, 128)),
    "mxfp8": ((2, 1), (10, 0), "Blackwell or newer", (32, 32)),
}


def parse_version(text: str) -> tuple[int, int]:
    """'2.11.0+abc' -> (2, 11)."""
    major, minor = re.match(r"(\d+)(?:\.(\d+))?", text).groups(default="0")
    return int(major), int(minor)


def installed_version() -> tuple[int, int] | None:
    """The installed version, or None; the package is not imported."""
    from megatron_ext.platform.machine import version_of

    text = version_of("transformer-engine")
    return None if text is None else parse_version(text)


def gpu_capability() -> tuple[int, int]:
    """Compute capability of this process's GPU, (0, 0) without one."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


@cache
def problem(on_gpu: bool) -> str | None:
    """Why Transformer Engine cannot be used, with what to install, or None.

    It is imported on a GPU only: on other machines the import itself can fail.
    """
    version = installed_version()
    if not on_gpu:
        return "it needs a GPU"
    if version is None or importlib.util.find_spec("transformer_engine") is None:
        return f"the package is not installed: {INSTALL}"
    if version < OLDEST:
        return f"{version[0]}.{version[1]} is too old, 2.0 or newer is needed: {INSTALL}"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:
        return f"its import fails ({type(error).__name__}: {error}): {INSTALL}; tools/doctor.py says more"
    return None


def recipe_problem(recipe: str, version: tuple[int, int], capability: tuple[int, int]) -> str | None:
    """Why an FP8 recipe does not run with a version and a GPU, or None."""
    oldest, least, cards, _ = RECIPES[recipe]
    if version < oldest:
        here = f"{version[0]}.{version[1]} is here"
        return f"Transformer Engine {oldest[0]}.{oldest[1]} or newer ({here}): {INSTALL}"
    if capability < least:
        return (
            f"a GPU of compute capability {least[0]}.{least[1]} ({cards}), this one has "
            f"{capability[0]}.{capability[1]}; use another recipe, or --bf16 without --fp8-format"
        )
    return None
