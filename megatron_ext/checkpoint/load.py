"""Loads the newest undamaged checkpoint, at any parallel layout."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint import Metadata

from megatron_ext.checkpoint import content, optimizer_part
from megatron_ext.checkpoint.errors import CheckpointError, DamagedCheckpoint, on_rank_0, together
from megatron_ext.checkpoint.found import find, outputs_of
from megatron_ext.checkpoint.integrity import damage, is_as_written
from megatron_ext.checkpoint.reader import read, read_common, read_shards
from megatron_ext.checkpoint.saved_args import require_room
from megatron_ext.config import RunConfig
from megatron_ext.config.model_function import Saved
from megatron_ext.models.layer_specs import CHECKPOINT_NAMES
from megatron_ext.platform.collective import gather

logger = logging.getLogger(__name__)


@dataclass
class LoadedState:
    """The state of a loaded checkpoint besides the tensors of model and optimizer.

    ``checkpoints`` are the iterations of its run in the folder up to this one, ascending.
    """

    iteration: int
    run_state: dict[str, Any]
    path: Path
    checkpoints: list[int] = field(default_factory=list)
    saved: Saved = field(default_factory=dict)
    optimizer_loaded: bool = False
    rng_loaded: bool = False


@dataclass(frozen=True)
class OpenedCheckpoint:
    """An undamaged checkpoint, its predecessors ``before`` it, its common part and its metadata."""

    folder: Path
    number: int
    before: list[int]
    common: dict[str, Any]
    metadata: Metadata

    @property
    def saved(self) -> Saved:
        """The arguments it was saved with."""
        return self.common.get("args") or {}

    @property
    def iteration(self) -> int:
        """The iteration after which it was saved."""
        return int(self.common.get("iteration", self.number))

    @property
    def run_state(self) -> dict[str, Any]:
        """The position of the run."""
        state = content.run_state_of(self.common)
        return {name: value for name, value in state.items() if name != "checkpoints"}

    @property
    def checkpoints(self) -> list[int]:
        """The iterations of its run in the folder up to this one, ascending."""
        return [*self.before, self.number]


def open_checkpoint(
    load_dir: str | Path, run: RunConfig, iteration: int | None = None
) -> OpenedCheckpoint | None:
    """Open the checkpoint that load_checkpoint would load, before the model is built; collective.

    Returns None and raises as load_checkpoint does.
    """
    wanted = iteration if iteration is not None else run.checkpoint.ckpt_step
    match = _find(Path(load_dir), wanted, outputs_of(run))
    if match is None:
        return None
    folder, number, before = match
    return OpenedCheckpoint(folder, number, before, *together(f"read {folder}", lambda: read(folder)))


def load_checkpoint(
    load_dir: str | Path,
    *,
    model: list[nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: content.Scheduler | None = None,
    run: RunConfig,
    strict: bool = True,
    iteration: int | None = None,
    opened: OpenedCheckpoint | None = None,
    finetune: bool | None = None,
    rng: bool = True,
) -> LoadedState | None:
    """Load the newest undamaged checkpoint of ``load_dir`` into model, optimizer and scheduler; collective.

    The tracker names the newest (``found.find`` has the other cases); an incomplete or altered checkpoint is
    reported in a warning, and its predecessor in the run is used. ``iteration`` (or ``--ckpt-step``) selects
    one checkpoint without such a fallback. Nothing in the folder is changed.
    ``finetune``, by default ``--finetune``, loads only the weights (iteration 0, any tokenizer);
    ``--no-load-optim`` and ``--no-load-rng`` (or ``rng=False``) leave parts out. Generators are restored
    only at the tensor and pipeline layout that saved them. ``opened`` is the result of an earlier
    open_checkpoint.

    Returns None if ``load_dir`` is empty or absent.

    Raises:
        CheckpointError: on every rank, if the folder is not empty but has no undamaged checkpoint, or if the
            checkpoint does not fit: another model, another tokenizer, another kind of optimizer state.
            ``strict=False`` only warns about weights of the checkpoint that the model lacks.
    """
    opened = opened or open_checkpoint(load_dir, run, iteration)
    if opened is None:
        return None
    folder, common, metadata = opened.folder, opened.common, opened.metadata
    finetune = run.checkpoint.finetune if finetune is None else finetune

    def check() -> None:
        content.require_same_function(common.get("args"), run.model, folder)
        if not finetune:
            content.require_same_tokenizer(common, run.tokenizer.tokenizer_sha256, folder)

    together(f"load {folder}", check)
    parts = _Parts(model, optimizer, scheduler, run, common, set(metadata.state_dict_metadata), finetune, rng)
    template = together(f"load {folder}", parts.template)
    _require_keys(folder, parts, template, strict)
    state = together(f"load {folder}", lambda: read_shards(template, folder, common, metadata))
    together(f"load {folder}", lambda: parts.apply(state))
    if finetune:
        return LoadedState(0, {}, folder, saved=opened.saved)
    return LoadedState(
        iteration=opened.iteration,
        run_state=opened.run_state,
        path=folder,
        checkpoints=opened.checkpoints,
        saved=opened.saved,
        optimizer_loaded=parts.with_optimizer,
        rng_loaded="rng_state" in state,
    )


def read_checkpoint_args(
    load_dir: str | Path, iteration: int | None = None, outputs: Iterable[Path] = ()
) -> Saved | None:
    """The arguments that a checkpoint was saved with, filtered by :mod:`saved_args`; does not communicate.

    By default those of the newest checkpoint with an undamaged file. None if the folder is absent, or empty
    except for ``outputs``.

    Raises:
        CheckpointError: the folder has other content, or the checkpoint cannot be read.
    """
    problem = None
    for folder, _ in find(load_dir, iteration, outputs).tries:
        try:
            saved = read_common(folder).get("args") or {}
            require_room(saved, folder)
            return saved
        except DamagedCheckpoint as error:
            # Intact but refused: not an interrupted save, but invalid content.
            if is_as_written(folder / "common.pt") and damage(folder) is None:
                raise
            problem = problem or error
    if problem:
        raise problem
    return None


def _find(load_dir: Path, wanted: int | None, outputs: list[Path]) -> tuple[Path, int, list[int]] | None:
    """Folder and iteration of the newest undamaged checkpoint, and its predecessors; collective."""
    found = on_rank_0(f"look into {load_dir}", lambda: find(load_dir, wanted, outputs))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for note in found.notes if rank == 0 else ():
        logger.warning(note)
    problems: list[str] = []
    for folder, number in found.tries:
        problem = together(f"check {folder}", partial(damage, folder, rank, world))
        problems = [p for p in gather(problem) if p]
        if not problems:
            return folder, number, [i for i in found.before if i < number]
        if rank == 0:
            logger.warning("checkpoint %s is damaged and not used: %s", folder, problems[0])
    if not found.tries:
        return None
    tried = ", ".join(folder.name for folder, _ in found.tries)
    raise CheckpointError(
        f"no whole checkpoint in {load_dir}; tried {tried}; the last problem: {problems[0]}"
    )


@dataclass
class _Parts:
    """Model, optimizer, scheduler and generators, and which of them the checkpoint holds."""

    model: list[nn.Module]
    optimizer: MegatronOptimizer | None
    scheduler: content.Scheduler | None
    run: RunConfig
    common: dict[str, Any]
    available: set[str]
    finetune: bool
    rng: bool

    def __post_init__(self) -> None:
        skip = self.finetune or self.run.checkpoint.no_load_optim
        self.with_optimizer = self.optimizer is not None and not skip
        rng = content.rng_object(None)
        skip_rng = self.finetune or not self.rng or self.run.checkpoint.no_load_rng
        self.with_rng = not skip_rng and rng.unique_key in self.available

    def template(self) -> dict[str, Any]:
        """The sharded tensors to fill, under the names that this checkpoint uses."""
        metadata = self.common.get("content_metadata") or {}
        state = content.model_part(self.model, metadata)
        if self.optimizer is not None and self.with_optimizer:
            state["optimizer"] = self._optimizer_template(self.optimizer, dict(state), metadata)
        else:
            self.common.pop("optimizer", None)
        if self.with_rng:
            state["rng_state"] = content.rng_object(None)
        for value in nested_values(state):
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                value.key = self._saved_name(value.key)
        return _without_absent_extra_state(state, self.available)

    def _optimizer_template(
        self, optimizer: MegatronOptimizer, model_state: dict[str, Any], metadata: dict[str, Any]
    ) -> dict[str, Any]:
        if "optimizer" not in self.common:
            raise CheckpointError(
                "it holds no optimizer state (--no-save-optim); add --no-load-optim or --finetune"
            )
        keep_rates = self.run.schedule.override_opt_param_scheduler
        optimizer_part.adapt_common(self.common, optimizer, keep_rates)
        if optimizer_part.kind_of(optimizer) == "distributed":
            metadata = {"distrib_optim_sharding_type": optimizer_part.RESHARDABLE} | metadata
        with torch.no_grad():
            return optimizer.sharded_state_dict(model_state, is_loading=True, metadata=metadata)

    def _saved_name(self, key: str) -> str:
        key = optimizer_part.master_key(key, self.available)
        if key not in self.available:
            for names in CHECKPOINT_NAMES.items():
                for ours, theirs in (names, names[::-1]):
                    renamed = optimizer_part.master_key(key.replace(ours, theirs), self.available)
                    if renamed in self.available:
                        return renamed
        return key

    def apply(self, state: dict[str, Any]) -> None:
        """Load the values into model, optimizer, scheduler and generators."""
        chunks = [content.unwrap(chunk) for chunk in self.model]
        for index, chunk in enumerate(chunks):
            chunk.load_state_dict(state["model" if len(chunks) == 1 else f"model{index}"], strict=False)
        with torch.no_grad():
            if self.optimizer is not None and self.with_optimizer:
                self.optimizer.load_state_dict(state["optimizer"])
            elif self.optimizer is not None:
                self.optimizer.reload_model_params()
        if self.scheduler is not None and self.with_optimizer and "opt_param_scheduler" in state:
            saved = self.common.get("args") or {}
            self.scheduler.restore(state["opt_param_scheduler"], saved, self.run)
        if self.with_rng:
            content.restore_rng(state["rng_state"])


def _without_absent_extra_state(state: dict[str, Any], available: set[str]) -> dict[str, Any]:
    """Drop extra state (scales of Transformer Engine) that the checkpoint does not hold."""

    def keep(value: object) -> bool:
        return not isinstance(value, ShardedObject) or value.unique_key in available

    return {
        name: {k: v for k, v in part.items() if keep(v)} if name.startswith("model") else part
        for name, part in state.items()
    }


def _require_keys(folder: Path, parts: _Parts, template: dict[str, Any], strict: bool) -> None:
    """Compare the weights that all ranks need with those in the checkpoint; collective."""
    own = {v.key for v in nested_values(template) if isinstance(v, ShardedTensor | ShardedTensorFactory)}
    needed = set().union(*gather(own))
    missing = sorted(needed - parts.available)
    unused = sorted(
        key
        for key in parts.available - needed
        if not key.startswith(("optimizer.", "rng_state", "chained_")) and "_extra_state" not in key
    )
    problems = [f"it lacks {', '.join(missing)}"] if missing else []
    problems += [f"this model has no {', '.join(unused)}"] if unused else []
    if problems and (strict or missing):
        raise CheckpointError(f"{folder} does not fit this model: {'; '.join(problems)}")
    if problems and torch.distributed.get_rank() == 0:
        logger.warning("%s: %s", folder, "; ".join(problems))


__all__ = ["LoadedState", "load_checkpoint", "read_checkpoint_args"]
