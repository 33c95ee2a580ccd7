"""The state of mask training on disk: written atomically, resumed bit for bit."""

import dataclasses
import pickle
import time
from pathlib import Path

import torch

from megatron_ext.common.files import write_aside
from megatron_ext.inherit.mask_training import MaskState, MaskTraining
from megatron_ext.inherit.report import facts
from megatron_ext.interchange.source import Source

SECONDS_BETWEEN_SAVES = 60.0


class StateFile:
    """The state file; the first rank writes it, every rank reads it.

    Args:
        path: None saves nothing.
        training, counts, source: identify the state; the state of another training is refused.
    """

    def __init__(self, path: str | None, training: MaskTraining, counts: dict[str, int], source: Source):
        self.path = None if path is None else Path(path)
        of = {name: str(value) for name, value in facts(source.model, source.dtype).items()}
        self.identity = {
            "training": dataclasses.asdict(training),
            "counts": counts,
            "source": of | {"iteration": source.iteration},
        }
        self.saved = time.monotonic()

    def resume(self, state: MaskState) -> None:
        """Resume from the file if it exists.

        Raises:
            ValueError: the file is damaged, or is the state of another training.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            content = torch.load(self.path, weights_only=True)
            identity, stored = content["identity"], content["state"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"--mask-state {self.path}: not a state of learned masks ({type(error).__name__}); "
                "remove it to start over"
            ) from error
        if identity != self.identity:
            differ = [name for name in self.identity if identity.get(name) != self.identity[name]]
            raise ValueError(
                f"--mask-state {self.path}: made with another {' and '.join(differ)}; give the same flags, "
                "or another file"
            )
        state.restore(stored)

    def save(self, state: MaskState, always: bool = False) -> None:
        """Write the state, at most once a minute unless ``always``."""
        due = always or time.monotonic() - self.saved >= SECONDS_BETWEEN_SAVES
        if self.path is None or not due or torch.distributed.get_rank():
            return
        content = {"identity": self.identity, "state": state.state()}
        write_aside(self.path, lambda file: torch.save(content, file))
        self.saved = time.monotonic()
