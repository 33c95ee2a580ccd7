"""Learned masks: which units to keep is trained, on the language-model loss, with the weights frozen.

The paper finds learned masks better than Taylor, l2 and l1, and publishes neither formula nor granularity.
Our reading: one logit for each hidden channel, FFN channel, query group and layer. The forward pass keeps
exactly the target's number of units, those of the highest logits, so what is trained is always a model of
the target's shape. The backward pass takes the gradient of a sigmoid around the threshold instead of that
of the step (straight through). Its temperature falls from start to end, and with it Gumbel noise on the
logits, by which early steps try units beside the best ones.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.inherit.calibration import average, forward
from megatron_ext.inherit.choice import top
from megatron_ext.inherit.masks import Masks, attached
from megatron_ext.training.batch import Batch


@dataclass(frozen=True)
class Recipe:
    """How masks are trained."""

    steps: int = 200
    learning_rate: float = 0.02
    temperature: tuple[float, float] = (1.0, 0.1)
    noise: float = 0.0
    patience: int = 30
    seed: int = 1234

    def temperature_at(self, step: int) -> float:
        """Falls geometrically from start to end over the steps."""
        start, end = self.temperature
        return start * (end / start) ** (step / max(1, self.steps - 1))


@dataclass
class Learned:
    """Where the training stands; what ``save`` writes and ``load`` reads."""

    logits: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int = 0
    unchanged: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def state(self) -> dict:
        """Plain values and tensors, which load without unpickling anything else."""
        plain = {name: getattr(self, name) for name in _COUNTERS}
        logits = {name: value.detach() for name, value in self.logits.items()}
        return plain | {"logits": logits, "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict) -> None:
        """Continue from what :meth:`state` gave."""
        for name in _COUNTERS:
            setattr(self, name, state[name])
        with torch.no_grad():
            for name, value in self.logits.items():
                value.copy_(state["logits"][name])
        self.optimizer.load_state_dict(state["optimizer"])


_COUNTERS = ("step", "unchanged", "tokens", "seconds", "losses")


def begin(start: Masks, recipe: Recipe, settled: Collection[str] = ()) -> Learned:
    """Logits from the ranks of first scores: a unit's share of those below it, as a normal quantile.

    Ranks have the same spread for every kind of unit, whatever the unit of the score, so one learning
    rate and one temperature fit all. The masks named in ``settled`` stay at the first scores' choice.
    """
    device = platform.current_device()
    logits = {name: _normal_ranks(score).float().to(device) for name, score in vars(start).items()}
    free = [value.requires_grad_(True) for name, value in logits.items() if name not in settled]
    return Learned(logits, torch.optim.Adam(free, lr=recipe.learning_rate, betas=(0.9, 0.95)))


def _normal_ranks(scores: Tensor) -> Tensor:
    ranks = scores.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).double()
    return torch.special.ndtri((ranks + 0.5) / scores.size(-1))


def straight_through(logits: Tensor, count: int, temperature: float) -> Tensor:
    """1 for the ``count`` highest logits of the last axis and 0 for the others, with a sigmoid's gradient.

    The sigmoid's centre is halfway between the last logit kept and the first dropped.
    """
    if count == logits.size(-1):
        return torch.ones_like(logits)
    ordered = logits.detach().sort(-1, descending=True).values
    threshold = ordered[..., count - 1 : count + 1].mean(-1, keepdim=True)
    soft = torch.sigmoid((logits - threshold) / temperature)
    hard = torch.zeros_like(logits).scatter_(-1, top(logits.detach(), count), 1.0)
    return hard + (soft - soft.detach())


def train(
    model: nn.Module,
    counts: dict[str, int],
    learned: Learned,
    steps: Callable[[int], Iterator[list[Batch]]],
    recipe: Recipe,
    note: Callable[[Learned], None],
) -> None:
    """Train the logits in place until the recipe's steps are done or the choice has come to rest.

    Args:
        model: the source, frozen.
        counts: name of a mask -> number of units to keep.
        steps: step -> this rank's microbatches of each step from there on.
        note: hears of every step done; where progress is shown and states are saved.

    It stops early when the choice without noise has been the same for ``patience`` steps. A collective
    call; all ranks end with the same logits, bit for bit.
    """
    masks = Masks(**learned.logits)
    before = choice_of(learned, counts)
    with attached(model, masks, hidden_kept=counts["hidden"]):
        for microbatches in steps(learned.step):
            if learned.step >= recipe.steps or learned.unchanged >= recipe.patience:
                return
            started = time.perf_counter()
            loss = _step(model, masks, counts, learned, microbatches, recipe)
            learned.losses.append(average(loss).item())
            learned.step += 1
            now = choice_of(learned, counts)
            same = all(torch.equal(now[name], before[name]) for name in now)
            learned.unchanged, before = learned.unchanged + 1 if same else 0, now
            learned.seconds += time.perf_counter() - started
            note(learned)


def _step(
    model: nn.Module,
    masks: Masks,
    counts: dict[str, int],
    learned: Learned,
    microbatches: list[Batch],
    recipe: Recipe,
) -> Tensor:
    """One update of the logits; the mean loss of this rank's microbatches, float64."""
    temperature = recipe.temperature_at(learned.step)
    noise = _noise(learned, recipe, temperature)
    loss = torch.zeros((), dtype=torch.float64)
    learned.optimizer.zero_grad()
    for batch in microbatches:
        for name, logits in learned.logits.items():
            noisy = logits + noise[name] if logits.requires_grad else logits
            setattr(masks, name, straight_through(noisy, counts[name], temperature))
        part = forward(model, batch).sum() / batch.loss_mask.sum() / len(microbatches)
        part.backward()
        loss += part.item()
        learned.tokens += batch.tokens.numel() * parallel_state.get_data_parallel_world_size()
    for logits in learned.logits.values():
        if logits.grad is not None:
            logits.grad.copy_(average(logits.grad))
    learned.optimizer.step()
    return loss


def choice_of(learned: Learned, counts: dict[str, int]) -> dict[str, Tensor]:
    """The units that the logits keep, by mask; ascending indices on the CPU."""
    return {name: top(logits.detach().cpu(), counts[name]) for name, logits in learned.logits.items()}


def _noise(learned: Learned, recipe: Recipe, temperature: float) -> dict[str, Tensor]:
    """Gumbel noise of one step: the same on every rank and in a run that was resumed."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + learned.step)
    scale = recipe.noise * temperature / recipe.temperature[0]
    noise = {}
    for name, logits in learned.logits.items():
        uniform = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
        noise[name] = (-scale * torch.log(-torch.log(uniform))).to(logits.device)
    return noise


def recipe_from(options: Namespace) -> Recipe:
    """The recipe that the tool's flags give."""
    return Recipe(
        steps=options.mask_steps,
        learning_rate=options.mask_lr,
        temperature=tuple(options.mask_temperature),
        noise=options.mask_noise,
        patience=options.mask_patience,
        seed=options.seed,
    )
