"""Learned masks: trains which units to keep, on the language-model loss, with frozen weights.

The paper finds learned masks better than Taylor, l2 and l1, but publishes neither formula nor granularity.
Our reading: one logit for each hidden channel, FFN channel, query group and layer. The masks are the sigmoid
of the logits around a threshold at which they sum to the target's number of units. The temperature falls
until the masks are almost 0 or 1, and the units with the highest logits are kept.

Masks between 0 and 1 make gradients comparable. A trained model's loss is flat in the mask of a unit that is
present, dL/dmask = 0 at 1, and steep in the mask of a missing one: hard masks with straight-through gradients
pull in any dropped unit, however unimportant, and gave worse results than their initial scores
(docs/inheritance.md). At 1/2 the slope is the importance of the unit, for a loss that is quadratic in the
mask.
"""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.inherit.calibration import average, forward
from megatron_ext.inherit.masks import Masks, attached
from megatron_ext.inherit.options import InheritOptions
from megatron_ext.inherit.selection import top
from megatron_ext.training.batch import Batch


@dataclass(frozen=True)
class MaskTraining:
    """Hyperparameters of mask training."""

    steps: int = 100
    learning_rate: float = 0.03
    temperature: tuple[float, float] = (0.3, 0.03)
    patience: int = 30
    seed: int = 1234

    def temperature_at(self, step: int) -> float:
        """The temperature, which falls geometrically from start to end over the steps."""
        start, end = self.temperature
        return start * (end / start) ** (step / max(1, self.steps - 1))

    def rate_at(self, step: int) -> float:
        """The learning rate, which falls to 0 so that the last steps average over batches."""
        return self.learning_rate * (1 - step / self.steps)


@dataclass
class MaskState:
    """The state of mask training, as saved and resumed."""

    logits: dict[str, Tensor]
    step: int = 0
    unchanged: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """The state as plain values and tensors, which the weights-only unpickler can load."""
        plain = {name: getattr(self, name) for name in _COUNTERS}
        return plain | {"logits": {name: value.detach() for name, value in self.logits.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state`."""
        for name in _COUNTERS:
            setattr(self, name, state[name])
        with torch.no_grad():
            for name, value in self.logits.items():
                value.copy_(state["logits"][name])


_COUNTERS = ("step", "unchanged", "tokens", "seconds", "losses")


def begin(start: Masks, settled: Collection[str] = ()) -> MaskState:
    """Initial logits from the ranks of ``start``: the normal quantile of each unit's relative rank.

    Ranks have the same spread for every kind of unit, whatever the scale of the score, so one learning
    rate and one temperature fit all. The masks named in ``settled`` keep the selection of ``start``.
    """
    device = platform.current_device()
    logits = {name: _normal_ranks(score).float().to(device) for name, score in vars(start).items()}
    for name, value in logits.items():
        value.requires_grad_(name not in settled)
    return MaskState(logits)


def _normal_ranks(scores: Tensor) -> Tensor:
    ranks = scores.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).double()
    return torch.special.ndtri((ranks + 0.5) / scores.size(-1))


def relaxed(logits: Tensor, count: int, temperature: float) -> Tensor:
    """Masks between 0 and 1, the sigmoid of the logits, that sum to ``count`` over the last axis.

    The threshold is found by bisection and is constant for the gradient, which flows only to the logits.
    """
    if count == logits.size(-1):
        return torch.ones_like(logits)
    fixed = logits.detach()
    low = fixed.min(-1, keepdim=True).values - _FAR * temperature
    high = fixed.max(-1, keepdim=True).values + _FAR * temperature
    for _ in range(_HALVINGS):
        threshold = (low + high) / 2
        too_many = torch.sigmoid((fixed - threshold) / temperature).sum(-1, keepdim=True) > count
        low, high = torch.where(too_many, threshold, low), torch.where(too_many, high, threshold)
    return torch.sigmoid((logits - (low + high) / 2) / temperature)


#: Distance in temperatures at which a sigmoid is 0 or 1 in fp32; number of bisections of the threshold.
_FAR, _HALVINGS = 20.0, 40


def train(
    model: nn.Module,
    counts: dict[str, int],
    state: MaskState,
    steps: Callable[[int], Iterator[list[Batch]]],
    training: MaskTraining,
    note: Callable[[MaskState], None],
) -> None:
    """Train the logits in place, for all steps or until the selection stops changing.

    Args:
        model: the source, frozen.
        counts: name of a mask -> number of units to keep.
        steps: step -> an iterator over this rank's microbatches of each step from there on.
        note: called after every step, to show progress and save the state.

    Stops early if the selection was the same for ``patience`` steps. A collective call; all ranks end with
    bitwise equal logits.
    """
    masks = Masks(**state.logits)
    before = selection_of(state, counts)
    with attached(model, masks, counts["hidden"], counts["groups"]):
        for microbatches in steps(state.step):
            if state.step >= training.steps or state.unchanged >= training.patience:
                return
            started = time.perf_counter()
            loss = _step(model, masks, counts, state, microbatches, training)
            state.losses.append(average(loss).item())
            state.step += 1
            now = selection_of(state, counts)
            same = all(torch.equal(now[name], before[name]) for name in now)
            state.unchanged, before = state.unchanged + 1 if same else 0, now
            state.seconds += time.perf_counter() - started
            note(state)


def _step(
    model: nn.Module,
    masks: Masks,
    counts: dict[str, int],
    state: MaskState,
    microbatches: list[Batch],
    training: MaskTraining,
) -> Tensor:
    """One update of the logits; returns the mean loss of this rank's microbatches, float64."""
    temperature = training.temperature_at(state.step)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in microbatches:
        for name, logits in state.logits.items():
            free, count = logits.requires_grad, counts[name]
            setattr(masks, name, relaxed(logits, count, temperature) if free else hard(logits, count))
        part = forward(model, batch).sum() / batch.loss_mask.sum() / len(microbatches)
        part.backward()
        loss += part.item()
        state.tokens += batch.tokens.numel() * parallel_state.get_data_parallel_world_size()
    for logits in state.logits.values():
        if logits.grad is not None:
            _descend(logits, average(logits.grad), training.rate_at(state.step))
    return loss


@torch.no_grad()
def _descend(logits: Tensor, gradient: Tensor, rate: float) -> None:
    """Update logits by ``rate`` times the gradient, normalized by the typical gradient of their kind.

    Adam would move every logit at the same speed, even those whose gradient is only noise.
    """
    logits -= rate * gradient / (gradient.square().mean().sqrt() + 1e-12)
    logits.grad = None


def hard(logits: Tensor, count: int) -> Tensor:
    """1 for the ``count`` highest logits of the last axis, 0 for the others."""
    return torch.zeros_like(logits).scatter_(-1, top(logits.detach(), count), 1.0)


def selection_of(state: MaskState, counts: dict[str, int]) -> dict[str, Tensor]:
    """The units to keep according to the logits, by mask; ascending indices on the CPU."""
    return {name: top(logits.detach().cpu(), counts[name]) for name, logits in state.logits.items()}


def training_from(options: InheritOptions) -> MaskTraining:
    """The hyperparameters in the tool's flags."""
    return MaskTraining(
        steps=options.mask_steps,
        learning_rate=options.mask_lr,
        temperature=(options.mask_temperature[0], options.mask_temperature[1]),
        patience=options.mask_patience,
        seed=options.seed,
    )
