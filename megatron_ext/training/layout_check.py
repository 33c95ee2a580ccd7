"""Compares the user's layout with one process: the same steps from the same weights, tensor by tensor.

A wrong composition of parallelisms trains and looks right; only its gradients show the error. Compared are:

- the loss of each step, and the norm of its gradients;
- every gradient, and every parameter after the update, assembled from the ranks' shards;
- copies of one tensor on several ranks, which must be equal whatever the reference. With dropout no other
  layout computes the same numbers, so only this comparison also runs with the user's dropout.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_ext.arguments.parser import read_args
from megatron_ext.config import RunConfig
from megatron_ext.config.run import concern_of
from megatron_ext.training import distributed
from megatron_ext.training.setup import build_trainer
from megatron_ext.training.signals import StopSignals
from megatron_ext.training.step_record import RankRecord, Shard, StepRecorder, relative_error

#: Allowed difference to one process relative to a tensor's norm, by the format of the parameters.
TOLERANCES = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.05}
#: Differences are relative to at least this fraction of the norm of all tensors: smaller ones are rounding.
SMALLEST_SHARE = 1e-3
#: Concerns that do not change the steps of a run; both runs ignore their flags, except those in KEPT.
LEFT_OUT = {"logging", "profiling", "checkpoint", "validation"}
KEPT = {"load", "pretrained_checkpoint", "ckpt_step", "finetune", "use_checkpoint_args"}


@dataclass(frozen=True)
class Difference:
    """``what`` differs in ``step`` by ``error``, relative."""

    kind: str
    what: str
    step: int
    error: float

    def __str__(self) -> str:
        where = f"step {self.step}: " if self.step else ""
        what = (
            f"copies of {self.what} differ between ranks" if self.kind == "copies" else f"{self.what} differs"
        )
        return f"{where}{what} by {self.error:.1e}"


def settings(
    argv: list[str], world_size: int | None, *, one_process: bool, dropout: bool = False
) -> RunConfig:
    """The user's command line at its own layout, or with ``one_process`` on one, with the same global batch.

    Raises:
        CommandLineError: with every problem of the command line.
    """

    def recorded(typed: dict[str, Any]) -> dict[str, Any]:
        values = {k: v for k, v in typed.items() if concern_of(k) not in LEFT_OUT or k in KEPT}
        values |= {"eval_iters": 0}
        return values if dropout else values | {"attention_dropout": 0.0, "hidden_dropout": 0.0}

    layout = read_args(argv, world_size=world_size, change=recorded)
    if not one_process:
        return layout

    def alone(typed: dict[str, Any]) -> dict[str, Any]:
        values = {k: v for k, v in recorded(typed).items() if concern_of(k) != "parallel"}
        values |= {"global_batch_size": layout.training.global_batch_size}
        if "padded_vocab_size" in typed:
            return values
        divisor = layout.tokenizer.make_vocab_size_divisible_by * layout.parallel.tensor_model_parallel_size
        return values | {"make_vocab_size_divisible_by": divisor}

    return read_args(argv, world_size=1, change=alone)


def record(run: RunConfig, folder: Path, steps: int) -> None:
    """Train ``steps`` steps and record them into an existing ``folder``; a collective call."""
    store = distributed.rendezvous_store(run.process)
    distributed.initialize(run, store)
    with StopSignals() as signals:
        trainer = build_trainer(run)
        trainer.callbacks.append(StepRecorder(folder, steps, signals))
        trainer.train(signals=signals)


@dataclass(frozen=True)
class Stored:
    """A shard on disk."""

    file: Path
    label: str

    def read(self) -> Shard:
        with safe_open(self.file, framework="pt") as opened:
            return Shard.of(self.label, opened.get_tensor(self.label))


class Record:
    """A record that :func:`record` wrote to a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        files = sorted(folder.glob("rank_*.json"))
        self.ranks = [RankRecord(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
        if not files or len(files) != self.ranks[0].world_size:
            raise ValueError(f"{folder}: not a whole record: it has {len(files)} rank_*.json")

    @property
    def steps(self) -> int:
        return len(self.ranks[0].grad_norms)

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.ranks[0].dtype]

    def losses(self) -> list[float]:
        """The loss of each step, from a rank that has it."""
        steps = zip(*(rank.losses for rank in self.ranks), strict=True)
        return [next((loss for loss in of_step if loss is not None), math.nan) for of_step in steps]

    def grad_norms(self) -> list[float]:
        """The gradient norm of each step, from the first rank."""
        return self.ranks[0].grad_norms

    def shards(self, step: int) -> dict[str, list[Stored]]:
        """Name -> the stored shards of a step."""
        found: dict[str, list[Stored]] = {}
        for file in sorted(self.folder.glob(f"step_{step}_rank_*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for label in opened.keys():
                    found.setdefault(label.rsplit(" ", 2)[0], []).append(Stored(file, label))
        return found


def compare(reference: Record, layout: Record) -> list[Difference]:
    """The differences above the tolerance, ordered by step, then by decreasing error."""
    if reference.steps != layout.steps:
        raise ValueError(f"{reference.folder} holds {reference.steps} steps, {layout.folder} {layout.steps}")
    tolerance, found = max(reference.tolerance, layout.tolerance), replicas(layout)
    for name, mine, theirs in (
        ("loss", layout.losses(), reference.losses()),
        ("norm of the gradients", layout.grad_norms(), reference.grad_norms()),
    ):
        for step, (value, expected) in enumerate(zip(mine, theirs, strict=True), 1):
            error = abs(value - expected) / abs(expected) if expected else abs(value)
            if not error <= tolerance:
                found.append(Difference("scalar", name, step, error))
    for step in range(1, layout.steps + 1):
        found += _tensors(reference, layout, step, tolerance)
    return sorted(found, key=lambda one: (one.step, -one.error))


def replicas(layout: Record) -> list[Difference]:
    """Copies of a tensor that differ between ranks: data parallel ones as recorded, others as stored."""
    tolerance = layout.tolerance / 10
    found = [
        Difference("copies", f"{name} on data parallel rank {rank.rank}", 0, error)
        for rank in layout.ranks
        for name, error in rank.replicas.items()
        if not error <= tolerance
    ]
    for step in range(1, layout.steps + 1):
        for name, places in layout.shards(step).items():
            first: dict[tuple[tuple[int, ...], torch.Size], Tensor] = {}
            for shard in (place.read() for place in places):
                values = first.setdefault((shard.offset, shard.values.shape), shard.values)
                if not (error := relative_error(shard.values, values)) <= tolerance:
                    found.append(Difference("copies", name, step, error))
    return found


def _tensors(reference: Record, layout: Record, step: int, tolerance: float) -> Iterator[Difference]:
    expected, actual = reference.shards(step), layout.shards(step)
    floors = {kind: SMALLEST_SHARE * norm for kind, norm in _norms(expected).items()}
    for name in sorted({*expected, *actual}):
        if name not in actual or name not in expected:
            yield Difference("tensor", f"{name}, which only one of the two has,", step, math.inf)
            continue
        mine, theirs = _whole(actual[name]), _whole(expected[name])
        if mine.shape != theirs.shape:
            yield Difference("tensor", f"{name} {[*mine.shape]}, not {[*theirs.shape]},", step, math.inf)
        elif not (error := relative_error(mine, theirs, floors[name.split(" ")[0]])) <= tolerance:
            yield Difference("tensor", name, step, error)


def _norms(stored: dict[str, list[Stored]]) -> dict[str, float]:
    """ "gradient", "parameter" -> the norm of all its tensors."""
    squares: dict[str, float] = {}
    for name, places in stored.items():
        kind = name.split(" ")[0]
        squares[kind] = squares.get(kind, 0.0) + _whole(places).double().square().sum().item()
    return {kind: math.sqrt(square) for kind, square in squares.items()}


def _whole(places: list[Stored]) -> Tensor:
    """The tensor assembled from its shards; NaN where a shard is missing."""
    shards = [place.read() for place in places]
    whole = torch.full(shards[0].shape, math.nan)
    for shard in shards:
        window = zip(shard.offset, shard.values.shape, strict=True)
        whole[tuple(slice(begin, begin + size) for begin, size in window)] = shard.values
    return whole
