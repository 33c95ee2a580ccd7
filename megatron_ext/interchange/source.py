"""A model to read from, whatever wrote it: ``open_source`` finds out what lies in a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.common.errors import first_line
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.model_function import Saved
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.tokenizer_files import TokenizerFiles


class Source(ABC):
    """A model's tensors under Megatron's names, unsharded, read one at a time.

    Attributes:
        path: the folder.
        model: what the model is.
        dtype: the number format of its tensors, the widest where they differ.
        tokenizer: its tokenizer's files; None where there are none.
        saved: a checkpoint's arguments; None for a Hugging Face folder.
        iteration: the training iteration of a checkpoint, else 0.
        kind: "hf" or "megatron".
        origin: one line on what was opened.
        notes: what the files say differently in two places, and which is taken.
    """

    kind: str

    path: Path
    model: ModelConfig
    dtype: torch.dtype
    tokenizer: TokenizerFiles | None
    saved: Saved | None = None
    iteration: int = 0
    origin: str = ""
    notes: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """What was opened, and where."""
        return f"{self.origin} in {self.path}"

    def keys(self) -> list[str]:
        """The names of all tensors, layers numbered, in the order of the forward pass."""
        return list(self.model.parameters())

    def get(self, key: str) -> Tensor:
        """The tensor of that name on the CPU, with memory of its own or a read-only view of the file.

        ``linear_qkv`` is interleaved by query group, ``linear_fc1`` is [gate; up], embedding and output
        layer have ``vocab_size`` rows: Megatron's layout at tensor parallel size 1, without padding.

        Raises:
            KeyError: the model has no such tensor.
            InterchangeError: it is not there, or has another size, or is not finite.
        """
        expected = self.model.without_padding.parameters()[key]
        try:
            tensor = self._read(key)
        except (LookupError, TypeError, RuntimeError) as error:  # of what damaged or hostile files lead to
            raise InterchangeError(f"{self.path}: {key} cannot be read: {first_line(error)}") from error
        if tensor.size() != expected:
            raise InterchangeError(
                f"{self.path}: {key} is {list(tensor.size())}, its configuration says {list(expected)}"
            )
        if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise InterchangeError(
                f"{self.path}: {key} holds NaN or Inf; the file was damaged or tampered with"
            )
        return tensor

    @abstractmethod
    def _read(self, key: str) -> Tensor:
        """The tensor as the files have it."""
