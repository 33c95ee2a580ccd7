"""Transformer Engine: whether it is usable, and the requirements of its FP8 recipes."""

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from functools import cache

#: The requirement in Megatron-Core 0.16.1's metadata: older versions are refused, newer ones cause a warning.
OLDEST, TOO_NEW = (2, 9), (2, 12)
ACCEPTED = ">=2.9,<2.12"
INSTALL = f"pip install --no-build-isolation 'transformer-engine[pytorch]{ACCEPTED}'"


@dataclass(frozen=True)
class Fp8Recipe:
    """Requirements of an FP8 recipe (transformer_engine/pytorch/quantization.py, check_recipe_support).

    The dimensions of every matrix must be multiples of ``rows`` and ``columns``. Scaling per tensor needs
    multiples of 8 in the forward pass, but in the backward pass the tokens are the columns of the weight
    gradient's product, where cuBLAS needs multiples of 16. The other recipes need whole blocks.
    """

    capability: tuple[int, int]
    cards: str
    rows: int
    columns: int
    cuda: tuple[int, int] = (0, 0)
    below: tuple[int, int] = (99, 0)


RECIPES = {
    "delayed": Fp8Recipe((8, 9), "Ada, Hopper or newer", 16, 16),
    "tensorwise": Fp8Recipe((8, 9), "Ada, Hopper or newer", 16, 16),
    "blockwise": Fp8Recipe((9, 0), "Hopper or newer", 128, 128, cuda=(12, 9)),
    "mxfp8": Fp8Recipe((10, 0), "data centre Blackwell", 32, 32, below=(12, 0)),
}


def parse_version(text: str) -> tuple[int, int]:
    """'2.11.0+abc' -> (2, 11)."""
    match = re.match(r"(\d+)(?:\.(\d+))?", text)
    major, minor = match.groups(default="0") if match else (0, 0)
    return int(major), int(minor)


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_version() -> tuple[int, int] | None:
    """The installed version, or None; the package is not imported."""
    text = version_of("transformer-engine")
    return None if text is None else parse_version(text)


def too_old_for_unfused_documents() -> bool:
    """Whether the installed version has no unfused attention for packed sequences (``thd``)."""
    version = installed_version()
    return version is not None and version < (2, 11)


def gpu() -> tuple[tuple[int, int], tuple[int, int]]:
    """Compute capability of this process's GPU, and torch's CUDA version; zeros without a GPU."""
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return capability, parse_version(torch.version.cuda or "0")


@cache
def problem(on_gpu: bool) -> str | None:
    """Why Transformer Engine cannot be used, and what to install, or None.

    It is imported only on a GPU: on other machines the import itself can fail.
    """
    version = installed_version()
    if not on_gpu:
        return "it needs a GPU"
    if version is None or importlib.util.find_spec("transformer_engine") is None:
        return f"the package is not installed: {INSTALL}"
    if version < OLDEST:
        return f"{version[0]}.{version[1]} is too old, {ACCEPTED} is needed: {INSTALL}"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:
        cause = error.__cause__ or error
        return f"its import fails ({type(cause).__name__}: {cause}): {INSTALL}; tools/doctor.py says more"
    return None


def recipe_problem(recipe: str, capability: tuple[int, int], cuda: tuple[int, int]) -> str | None:
    """Why an FP8 recipe does not run on a GPU with torch's CUDA, or None."""
    needs = RECIPES[recipe]
    if not needs.capability <= capability < needs.below:
        least = f"{needs.capability[0]}.{needs.capability[1]}"
        return (
            f"a GPU of compute capability {least} ({needs.cards}), this one has "
            f"{capability[0]}.{capability[1]}; use another recipe, or --bf16 without --fp8-format"
        )
    if cuda < needs.cuda:
        return (
            f"a torch built for CUDA {needs.cuda[0]}.{needs.cuda[1]} or newer, this one is for "
            f"{cuda[0]}.{cuda[1]}; use another recipe"
        )
    return None
