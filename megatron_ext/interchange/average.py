"""The weighted mean of checkpoints of one run (stochastic weight averaging, arXiv 1803.05407), or of several.

At a constant learning rate the weights move around a minimum, and their mean lies closer to it. The mean of
the last checkpoints stands in for a part of the decay (LAWA, arXiv 2306.03241).
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ext.checkpoint import CheckpointError
from megatron_ext.checkpoint.found import find
from megatron_ext.common.files import is_same_place
from megatron_ext.common.flags import flag, wrong_fields
from megatron_ext.common.progress import Progress
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.numbers import DTYPES
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.source import Source
from megatron_ext.interchange.target import write_checkpoint


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """An average; each field is a flag of tools/average_checkpoints.py."""

    load: list[str] = flag(metavar="DIR")
    """Folders of runs, whose newest checkpoint is taken, or single checkpoints (RUN/iter_0000100)."""

    save: str = flag(metavar="DIR")
    """A folder without checkpoints."""

    ckpt_step: list[int] | None = flag(None)
    """Iterations to average; --load is one run then."""

    last: int | None = flag(None, minimum=1)
    """Average this many of the newest checkpoints; --load is one run then."""

    weights: list[float] | None = flag(None)
    """A weight for each checkpoint in order, the newest first with --last; they are divided by their sum.
    Without it, all count the same."""

    dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """Number format to write; the mean itself is computed in fp64."""

    def problems(self) -> list[str]:
        """What cannot be meant, by the names of the flags."""
        found = list(wrong_fields(self))
        if self.ckpt_step is not None and self.last is not None:
            found.append("--ckpt-step and --last both say which checkpoints: give one")
        if (self.ckpt_step is not None or self.last is not None) and len(self.load) > 1:
            found.append(f"--ckpt-step and --last choose from one run, --load names {len(self.load)}")
        weights = self.weights
        if weights is not None and not (all(map(math.isfinite, weights)) and sum(weights) > 0):
            found.append(f"--weights {' '.join(map(str, weights))}: must be finite, with a sum above 0")
        return found


def average(options: AverageOptions, quiet: bool = False) -> dict[str, Any]:
    """Write the mean, tensor by tensor, as a checkpoint of iteration 0; the summary of what was done.

    Raises:
        InterchangeError: bad input, or models or tokenizers that differ; nothing was written.
    """
    sources = [open_source(folder) for folder in checkpoints(options)]
    weights = options.weights or [1.0] * len(sources)
    if len(weights) != len(sources):
        raise InterchangeError(f"--weights names {len(weights)} weights for {len(sources)} checkpoints")
    for number, source in enumerate(sources):
        _require_same(sources[0], source)
        if any(is_same_place(source.path, other.path) for other in sources[:number]):
            raise InterchangeError(f"{source.path} is named twice; --weights lets it count for more")
    shares = [weight / math.fsum(weights) for weight in weights]
    tokenizer = next((source.tokenizer for source in sources if source.tokenizer), None)
    if tokenizer is None:
        print("WARNING: no tokenizer was found, the result's ids are numbers", file=sys.stderr)
    dtype = DTYPES.get(options.dtype, sources[0].dtype)
    with Progress("averaging", len(sources[0].keys()), "tensors", quiet=quiet) as progress:

        def mean(key: str) -> Tensor:
            tensor = weighted_sum((source.get(key) for source in sources), shares)
            progress.add(1, key)
            return tensor.float()

        written = write_checkpoint(options.save, sources[0].model, dtype, mean, tokenizer=tokenizer)
    return {
        "from": [source.description for source in sources],
        "weights": shares,
        "to": str(written),
        "dtype": str(dtype).removeprefix("torch."),
    }


def weighted_sum(tensors: Iterable[Tensor], shares: list[float]) -> Tensor:
    """sum_i shares_i * tensors_i in fp64; one tensor more than the sum is in memory."""
    total: Tensor | None = None
    for tensor, share in zip(tensors, shares, strict=True):
        part = tensor.to(torch.float64) * share
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def checkpoints(options: AverageOptions) -> list[Path]:
    """The checkpoints that are meant, each by its folder."""
    if options.ckpt_step is None and options.last is None:
        return [Path(folder) for folder in options.load]
    run = options.load[0]
    try:
        if options.ckpt_step is not None:
            return [find(run, iteration).tries[0][0] for iteration in options.ckpt_step]
        newest = [folder for folder, _ in find(run).tries[: options.last]]
    except CheckpointError as error:
        raise InterchangeError(f"--load: {error}") from error
    if len(newest) < (options.last or 0):
        raise InterchangeError(f"--last {options.last}: {run} holds {len(newest)} checkpoints")
    return newest


def _require_same(first: Source, other: Source) -> None:
    """Raise unless the two are one model with one vocabulary."""
    there = vars(other.model.without_padding)
    ours = vars(first.model.without_padding).items()
    differ = [f"{name} {value} and {there[name]}" for name, value in ours if value != there[name]]
    if differ:
        raise InterchangeError(f"{first.path} and {other.path} are different models: {', '.join(differ)}")
    if first.tokenizer and other.tokenizer and first.tokenizer.sha256 != other.tokenizer.sha256:
        raise InterchangeError(f"{first.path} and {other.path} have different tokenizers")
