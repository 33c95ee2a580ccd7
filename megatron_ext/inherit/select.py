"""Selects layers, then channels and groups, according to the flags."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config.model import ModelConfig
from megatron_ext.inherit import depth, report, width
from megatron_ext.inherit.options import InheritOptions
from megatron_ext.inherit.selection import Selection
from megatron_ext.inherit.width import Scores
from megatron_ext.interchange.source import Source


@dataclass
class SelectionResult:
    """The selection, and the measurements that led to it."""

    depth_policy: str
    width_criterion: str
    selection: Selection
    losses_without: Tensor | None = None  # [L], if the layers were measured
    learned: dict[str, Any] | None = None
    """Steps, tokens, seconds, losses of the masks' training."""
    scores: Scores | None = field(default=None, repr=False)

    def summary(self) -> dict[str, Any]:
        """For the report."""
        layers = {"policy": self.depth_policy, "kept": self.selection.layers.tolist()}
        if self.losses_without is not None:
            layers["loss_without"] = self.losses_without.tolist()
        summary = {
            "depth": layers,
            "width": {
                "criterion": self.width_criterion,
                "hidden": self.selection.hidden.tolist(),
                "groups": self.selection.groups.tolist(),
            },
        }
        return summary | ({"learned": self.learned} if self.learned else {})


def select(options: InheritOptions, source: Source, target: ModelConfig, calibration: Any) -> SelectionResult:
    """Select according to the flags; ``calibration`` runs the source on text, None if not needed."""
    losses = None
    if options.depth_policy in ("importance", "learned"):
        losses = _losses_without(calibration)
    layers = _layers(options, source.model.num_layers, target.num_layers, losses)
    if options.width_criterion == "learned":
        return _learned(options, source, target, calibration, layers, losses)
    scores = _scores(options, source, calibration, layers)
    selection = width.select(scores, layers, target)
    return SelectionResult(options.depth_policy, options.width_criterion, selection, losses, scores=scores)


def _layers(options: InheritOptions, layers: int, keep: int, losses: Tensor | None) -> Tensor:
    if options.depth_policy == "list":
        return depth.listed(options.layers or [], layers, keep)
    if options.depth_policy in ("importance", "learned"):
        return depth.by_importance(losses, keep)
    return {"ends": depth.ends, "uniform": depth.uniform}[options.depth_policy](layers, keep)


def _losses_without(calibration: Any) -> Tensor:
    from megatron_ext.inherit.importance import losses_without_each_layer

    with report.progress("skipping layers", calibration.config.num_layers) as progress:
        return losses_without_each_layer(
            calibration.model,
            calibration.config,
            lambda: calibration.loss().nats,
            lambda layer: progress.add(text=f"layer {layer}"),
        )


def _scores(options: InheritOptions, source: Source, calibration: Any, layers: Tensor) -> Scores:
    """The scores of the criteria without training."""
    if options.width_criterion == "random":
        return width.random(source.model, options.seed)
    power = 1 if options.width_criterion == "l1" else 2
    if options.width_criterion != "taylor":
        with report.progress("weighing", len(source.keys())) as progress:
            return width.magnitude(progress.over(source.keys()), source.get, source.model, power)
    return _taylor(source, calibration, layers)


def _taylor(source: Source, calibration: Any, layers: Tensor) -> Scores:
    """First-order scores with only ``layers`` active; l2 scores for bottleneck units."""
    from megatron_ext.inherit.importance import taylor

    with report.progress("taylor", None) as progress:
        importance = taylor(
            calibration.model, calibration.config, layers, progress.over(calibration.batches())
        )
    return Scores(importance.hidden, importance.ffn, importance.groups, _bottleneck(source))


def _bottleneck(source: Source) -> Tensor:
    keys = [key for key in source.keys() if ".augmented_shortcut." in key]
    return width.magnitude(keys, source.get, source.model, 2).bottleneck


def _learned(
    options: InheritOptions,
    source: Source,
    target: ModelConfig,
    calibration: Any,
    layers: Tensor,
    losses: Tensor | None,
) -> SelectionResult:
    """Train masks, starting from the first-order scores."""
    from megatron_ext.inherit import mask_training
    from megatron_ext.inherit.mask_state_file import StateFile
    from megatron_ext.inherit.masks import Masks

    training = mask_training.training_from(options)
    free_depth = options.depth_policy == "learned"
    every = torch.arange(source.model.num_layers)
    first = _taylor(source, calibration, every if free_depth else layers)
    kept_layers = torch.zeros(source.model.num_layers, dtype=torch.float64)
    kept_layers[layers] = 1.0
    start = Masks(first.hidden, first.ffn, first.groups, losses if free_depth else kept_layers)
    learned = mask_training.begin(start, settled=() if free_depth else ("layers",))
    counts = {
        "hidden": target.hidden_size,
        "ffn": target.ffn_hidden_size,
        "groups": target.query_groups,
        "layers": target.num_layers,
    }
    state = StateFile(options.mask_state, training, counts, source)
    state.resume(learned)
    with report.progress("masks", training.steps) as progress:
        progress.skip(learned.step)

        def note(now: mask_training.MaskState) -> None:
            progress.add(text=f"loss {now.losses[-1]:.4f}, unchanged for {now.unchanged}")
            state.save(now)

        mask_training.train(calibration.model, counts, learned, calibration.steps, training, note)
    kept = mask_training.selection_of(learned, counts)
    state.save(learned, always=True)
    rows = kept["layers"]
    selection = Selection(
        layers=rows,
        hidden=kept["hidden"],
        ffn=kept["ffn"][rows],
        groups=kept["groups"][rows],
        bottleneck=width.select(first, rows, target).bottleneck,
    )
    facts = {name: getattr(learned, name) for name in ("step", "tokens", "seconds", "losses")}
    facts["stopped_early"] = learned.step < training.steps
    return SelectionResult(options.depth_policy, "learned", selection, losses, facts)
