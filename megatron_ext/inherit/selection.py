"""From the flags to a choice: which layers, then which channels and groups."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config.model import ModelConfig
from megatron_ext.inherit import depth, report, width
from megatron_ext.inherit.choice import Choice
from megatron_ext.inherit.options import InheritOptions
from megatron_ext.inherit.width import Scores
from megatron_ext.interchange.source import Source


@dataclass
class Selection:
    """What is kept and how that was found."""

    depth_policy: str
    width_criterion: str
    choice: Choice
    losses_without: Tensor | None = None  # [L], if the layers were measured
    learned: dict[str, Any] | None = None
    """Steps, tokens, seconds, losses of the masks' training."""
    scores: Scores | None = field(default=None, repr=False)

    def summary(self) -> dict[str, Any]:
        """For the report."""
        layers = {"policy": self.depth_policy, "kept": self.choice.layers.tolist()}
        if self.losses_without is not None:
            layers["loss_without"] = self.losses_without.tolist()
        summary = {
            "depth": layers,
            "width": {
                "criterion": self.width_criterion,
                "hidden": self.choice.hidden.tolist(),
                "groups": self.choice.groups.tolist(),
            },
        }
        return summary | ({"learned": self.learned} if self.learned else {})


def select(options: InheritOptions, source: Source, target: ModelConfig, probe: Any) -> Selection:
    """Choose as the flags say; ``probe`` runs the source on text, None where no flag needs it."""
    losses = None
    if options.depth_policy in ("importance", "learned"):
        losses = _losses_without(probe)
    layers = _layers(options, source.model.num_layers, target.num_layers, losses)
    if options.width_criterion == "learned":
        return _learned(options, source, target, probe, layers, losses)
    scores = _scores(options, source, probe, layers)
    choice = width.choose(scores, layers, target)
    return Selection(options.depth_policy, options.width_criterion, choice, losses, scores=scores)


def _layers(options: InheritOptions, layers: int, keep: int, losses: Tensor | None) -> Tensor:
    if options.depth_policy == "list":
        return depth.listed(options.layers or [], layers, keep)
    if options.depth_policy in ("importance", "learned"):
        return depth.by_importance(losses, keep)
    return {"ends": depth.ends, "uniform": depth.uniform}[options.depth_policy](layers, keep)


def _losses_without(probe: Any) -> Tensor:
    from megatron_ext.inherit.importance import losses_without_each_layer

    with report.progress("skipping layers", probe.config.num_layers) as progress:
        return losses_without_each_layer(
            probe.model,
            probe.config,
            lambda: probe.loss().nats,
            lambda layer: progress.add(text=f"layer {layer}"),
        )


def _scores(options: InheritOptions, source: Source, probe: Any, layers: Tensor) -> Scores:
    """The scores of the criteria that are no training."""
    if options.width_criterion == "random":
        return width.random(source.model, options.seed)
    power = 1 if options.width_criterion == "l1" else 2
    if options.width_criterion != "taylor":
        with report.progress("weighing", len(source.keys())) as progress:
            return width.magnitude(progress.over(source.keys()), source.get, source.model, power)
    return _taylor(source, probe, layers)


def _taylor(source: Source, probe: Any, layers: Tensor) -> Scores:
    """First-order scores with the layers that go switched off; of bottleneck units the l2."""
    from megatron_ext.inherit.importance import taylor

    with report.progress("taylor", None) as progress:
        worth = taylor(probe.model, probe.config, layers, progress.over(probe.batches()))
    return Scores(worth.hidden, worth.ffn, worth.groups, _bottleneck(source))


def _bottleneck(source: Source) -> Tensor:
    keys = [key for key in source.keys() if ".augmented_shortcut." in key]
    return width.magnitude(keys, source.get, source.model, 2).bottleneck


def _learned(
    options: InheritOptions,
    source: Source,
    target: ModelConfig,
    probe: Any,
    layers: Tensor,
    losses: Tensor | None,
) -> Selection:
    """Masks trained from where the first-order scores stand."""
    from megatron_ext.inherit import learn
    from megatron_ext.inherit.learn_state import StateFile
    from megatron_ext.inherit.masks import Masks

    recipe = learn.recipe_from(options)
    free_depth = options.depth_policy == "learned"
    every = torch.arange(source.model.num_layers)
    first = _taylor(source, probe, every if free_depth else layers)
    worth = torch.zeros(source.model.num_layers, dtype=torch.float64)
    worth[layers] = 1.0
    start = Masks(first.hidden, first.ffn, first.groups, losses if free_depth else worth)
    learned = learn.begin(start, settled=() if free_depth else ("layers",))
    counts = {
        "hidden": target.hidden_size,
        "ffn": target.ffn_hidden_size,
        "groups": target.query_groups,
        "layers": target.num_layers,
    }
    state = StateFile(options.mask_state, recipe, counts, source)
    state.resume(learned)
    with report.progress("masks", recipe.steps) as progress:
        progress.skip(learned.step)

        def note(now: learn.Learned) -> None:
            progress.add(text=f"loss {now.losses[-1]:.4f}, unchanged for {now.unchanged}")
            state.save(now)

        learn.train(probe.model, counts, learned, probe.steps, recipe, note)
    kept = learn.choice_of(learned, counts)
    state.save(learned, always=True)
    rows = kept["layers"]
    choice = Choice(
        layers=rows,
        hidden=kept["hidden"],
        ffn=kept["ffn"][rows],
        groups=kept["groups"][rows],
        bottleneck=width.choose(first, rows, target).bottleneck,
    )
    facts = {name: getattr(learned, name) for name in ("step", "tokens", "seconds", "losses")}
    facts["stopped_early"] = learned.step < recipe.steps
    return Selection(options.depth_policy, "learned", choice, losses, facts)
