"""Finds the checkpoints in a folder, and tells an empty folder from an unusable one.

A run starts from its initial weights only if its folder is empty or absent; a folder with other content but
without a usable checkpoint is an error that says what was found. This module only reads: the folder may
belong to a running job.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.checkpoint import folders
from megatron_ext.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megatron_ext.checkpoint.folders import RELEASE, TRACKER
from megatron_ext.checkpoint.reader import read_common
from megatron_ext.config import RunConfig

#: Arguments that name outputs of a run, which may be in its --save folder before the first checkpoint.
_OUTPUTS = ("metrics_file", "tensorboard_dir", "wandb_save_dir", "data_cache_path", "memory_snapshot_path")
#: Files with fixed names that a run writes into its --save folder, and the entry of a new disk.
_NO_CHECKPOINTS = {"progress.txt", "bad_samples.jsonl", "wandb", "lost+found"}
_START_OVER = "only an empty or new folder, or a run without --load, starts from the initial weights"


@dataclass
class Found:
    """The checkpoint to resume from, then those to fall back to; empty for an empty folder.

    Attributes:
        tries: folder and iteration of each.
        before: the iterations of the first one's predecessors in its run, ascending.
        notes: messages for the user on the choice.
    """

    tries: list[tuple[Path, int]] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(base: str | os.PathLike[str], wanted: int | None = None, outputs: Iterable[Path] = ()) -> Found:
    """Find the checkpoint of iteration ``wanted``, by default the tracker's, in ``base``.

    The newest checkpoint is used if the tracker is missing or names no iteration, or if it names a missing
    one and all others are older. A damaged checkpoint is replaced by the newest one before it in the same
    run; checkpoints later than the point that the run was set back to are not part of it. ``outputs`` are
    files of the run itself, which may be in the folder before the first checkpoint.

    Raises:
        CheckpointError: the folder is not empty but has no usable checkpoint, or the choice is ambiguous.
    """
    base = Path(base)
    if os.path.lexists(base) and not base.is_dir():
        link = "a link that leads nowhere" if base.is_symlink() else "a file, not a folder"
        raise CheckpointError(f"{base} is {link}; {_START_OVER}")
    stored = folders.stored(base)
    if wanted is not None:
        if wanted not in stored:
            raise CheckpointError(
                f"there is no {folders.checkpoint_dir(base, wanted)}; it has {list(stored)}"
            )
        return Found([(stored[wanted], wanted)], _before(stored, wanted))
    named = folders.tracked(base)
    converted = named == RELEASE or not (stored or isinstance(named, int))
    if converted and (base / RELEASE).is_dir():
        return Found([(base / RELEASE, 0)])
    if not stored and named is None:
        _require_empty(base, outputs)
        return Found()
    chosen, notes = _chosen(base, named, list(stored))
    before = _before(stored, chosen)
    return Found([(stored[i], i) for i in (chosen, *reversed(before))], before, notes)


def outputs_of(run: RunConfig) -> list[Path]:
    """The files and folders that a run writes besides its checkpoints."""
    names = [run.get(name) for name in _OUTPUTS]
    losses = run.rounds.record_sample_loss
    if losses:
        stem = losses.removesuffix(".npy")
        names += [f"{stem}{end}" for end in (".npy", ".tokens.npy", ".sources.npy", ".json")]
    return [Path(name).resolve() for name in names if name]


def _require_empty(base: Path, outputs: Iterable[Path]) -> None:
    """Raise if a folder holds more than hidden files (such as our lock) and the run's own outputs."""
    if not base.is_dir():
        return
    if (base / ".metadata").exists() or (base / "common.pt").exists():
        raise CheckpointError(
            f"{base} is one checkpoint, not the folder that holds it: give the folder above it, with "
            f"--ckpt-step, and the name iter_ and seven digits to this one"
        )
    outputs = list(outputs)
    other = sorted(
        entry.name
        for entry in base.iterdir()
        if not entry.name.startswith((".", "events.out.tfevents."))
        and entry.name not in _NO_CHECKPOINTS
        and not any(path.is_relative_to(entry.resolve()) for path in outputs)
    )
    if other:
        shown = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        hint = "; tools/convert_checkpoint.py --from hf makes a checkpoint of a Hugging Face folder"
        raise CheckpointError(
            f"{base} holds no checkpoint, but {shown}; {_START_OVER}{hint if 'config.json' in other else ''}"
        )


def _chosen(base: Path, named: int | str | None, present: list[int]) -> tuple[int, list[str]]:
    """The iteration to resume from, and notes for the user."""
    if isinstance(named, int) and named in present:
        newer = [i for i in present if i > named]
        note = f"{base / TRACKER} names iteration {named}: the newer ones there, {newer}, are not used"
        return named, [note] if newer else []
    if named is None:
        says = f"there is no {base / TRACKER}"
    elif isinstance(named, int) or named == RELEASE:
        says = f"{base / TRACKER} names {'' if named == RELEASE else 'iteration '}{named}, which is not there"
    else:
        says = f"{base / TRACKER} names no iteration ({named[:40]!r})"
    if not present:
        raise CheckpointError(f"{says}, nor is there any checkpoint; {_START_OVER}")
    if named == RELEASE or (isinstance(named, int) and named < present[-1]):
        raise CheckpointError(f"{says}; --ckpt-step takes one of those that are, {present}; {_START_OVER}")
    return present[-1], [f"{says}; taking the newest checkpoint, of iteration {present[-1]}"]


def _before(stored: dict[int, Path], iteration: int) -> list[int]:
    """The predecessors of a checkpoint: those that it names, or all older ones if it names none."""
    older = [other for other in stored if other < iteration]
    try:
        named = read_common(stored[iteration]).get("pangu_pro", {}).get("run_state", {}).get("checkpoints")
    except DamagedCheckpoint:
        named = None
    return [other for other in older if other in named] if isinstance(named, list) else older
