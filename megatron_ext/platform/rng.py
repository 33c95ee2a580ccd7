"""Random number generators: seeds, and the state that checkpoints keep."""

import random
from typing import TYPE_CHECKING

from megatron_ext.platform.device import on_gpu

if TYPE_CHECKING:
    import torch


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> "dict[str, torch.Tensor]":
    """The state of the device's generator, under the key that checkpoints store it by."""
    import torch

    return {"device": torch.cuda.get_rng_state() if on_gpu() else torch.get_rng_state()}


def set_rng_state(state: "dict[str, torch.Tensor]") -> None:
    """Restore what :func:`rng_state` returned."""
    import torch

    (torch.cuda.set_rng_state if on_gpu() else torch.set_rng_state)(state["device"])
