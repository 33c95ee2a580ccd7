"""Checks what has changed in a resumed run, and settles the training set that it reads.

A checkpoint's position, in samples and in the schedule, is only meaningful together with the training set
and the schedule that it refers to. All differences are found here, before the model is built: some are
supported, the others are refused with the flags that resolve them (docs/training.md has the table).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.arguments.defaults import iterations_left, running_batch
from megatron_ext.checkpoint import CheckpointError, OpenedCheckpoint
from megatron_ext.checkpoint.saved_args import run_of
from megatron_ext.config import RunConfig
from megatron_ext.config.model_function import Saved
from megatron_ext.data.identity import differences, identify, stated
from megatron_ext.data.rounds.dataset import RoundIndex
from megatron_ext.platform.collective import on_first_rank, print_rank_0
from megatron_ext.tokenizer import Tokenizer
from megatron_ext.training import schedule
from megatron_ext.training.data import samples_drawn, samples_to_read
from megatron_ext.training.state import Progress

#: Flags that change which tokens count in the loss, or the context they are predicted from.
LOSS_FLAGS = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")


@dataclass
class Start:
    """The starting point of a run.

    Attributes:
        checkpoint: the source of its weights, None for initial weights.
        folder: the folder that the checkpoint was found in.
        goes_on: whether the run resumes from the checkpoint, instead of taking only its weights.
        progress: the progress of the run.
    """

    checkpoint: OpenedCheckpoint | None = None
    folder: str | None = None
    goes_on: bool = False
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        if self.goes_on and self.checkpoint is not None:
            state = self.checkpoint.run_state
            known = {name: state[name] for name in vars(Progress()) if name in state}
            self.progress = Progress(**known)
            self.progress.iteration = self.checkpoint.iteration
            self.progress.checkpoints = self.checkpoint.checkpoints
            if "consumed_train_tokens" not in state:
                length = self.checkpoint.saved.get("seq_length") or 0
                self.progress.consumed_train_tokens = self.progress.consumed_train_samples * length


def settle(
    start: Start, run: RunConfig, tokenizer: Tokenizer, index: RoundIndex | None, new_round: bool
) -> None:
    """Compare a run with the checkpoint that it resumes from, and settle its training set; a collective call.

    Sets ``training_set`` of ``start.progress``, ``round_start`` if another training set begins, and
    ``run.training.train_iters`` of a run in samples.

    Args:
        new_round: whether the run has just entered the round of ``index``.

    Raises:
        CheckpointError: on every rank, naming every unsupported difference and the flags that resolve it.
    """
    progress = start.progress
    if run.training.train_samples is not None:
        left = iterations_left(run, progress.consumed_train_samples)
        run.training.train_iters = progress.iteration + left
    if run.validation.skip_train:
        return
    samples = samples_drawn(progress, run) if index is None else index.manifest["samples"]
    ours = described(run, tokenizer, samples)
    before = start.checkpoint if start.goes_on and progress.consumed_train_samples > 0 else None
    theirs = ours if before is None or new_round else _training_set_of(progress, before, ours)
    if index is not None:
        theirs = theirs | {"samples": samples}  # the first round's, which the index numbers
    changed = differences(theirs, {name: value for name, value in ours.items() if name != "samples"})
    if before is not None:
        _refuse(f"the run in {start.folder}", before, run, changed)
        for note in _notes(before.saved, progress, run):
            print_rank_0(note)
    progress.training_set = ours | {"samples": theirs["samples"]}
    if changed:
        progress.round_start = progress.consumed_train_samples
        progress.training_set["samples"] = max(1, samples_to_read(progress, run))
        print_rank_0(
            f"WARNING: another training set from iteration {progress.iteration} on, read from its beginning: "
            + "; ".join(changed)
        )


def described(run: RunConfig, tokenizer: Tokenizer, samples: int) -> dict[str, Any]:
    """The description of a training set that is shuffled for so many samples; a collective call."""
    ours = on_first_rank(lambda: identify(run, tokenizer, samples))
    return ours | {"mock": bool(run.data.mock_data), "dataloader_type": run.data.dataloader_type}


def _training_set_of(progress: Progress, before: OpenedCheckpoint, ours: dict[str, Any]) -> dict[str, Any]:
    """The description in a checkpoint; without one (Megatron-LM's checkpoints), what its arguments say."""
    description = progress.training_set
    if isinstance(description, dict) and type(description.get("samples")) is int:
        return description
    return ours | stated(before.saved)


def _refuse(name: str, before: OpenedCheckpoint, run: RunConfig, changed: list[str]) -> None:
    """Raise CheckpointError for another schedule, optimizer or training set that no flag allows."""
    saved, problems = before.saved, []
    rates = before.common.get("opt_param_scheduler")
    if rates and not run.checkpoint.no_load_optim and (conflicts := schedule.conflicts(rates, saved, run)):
        problems.append(f"another schedule ({'; '.join(conflicts)}): {schedule.WAYS_OUT}")
    theirs, ours = saved.get("optimizer"), run.optimizer.optimizer
    same = theirs in (None, ours) or {theirs, ours} == {"muon", "dist_muon"}
    if rates and not run.checkpoint.no_load_optim and not same:
        problems.append(
            f"another optimizer (--optimizer: {theirs} there, {ours} here), which has no use for its state: "
            "--no-load-optim starts with a new one"
        )
    if changed and not run.data.override_training_set:
        problems.append(
            f"another training set ({'; '.join(changed)}): give the flags that the run was begun with; "
            "--override-training-set goes on with this one from its beginning, --finetune begins a new run "
            "with the weights alone"
        )
    if problems:
        raise CheckpointError(f"{name} was begun with " + ", and with ".join(problems))


def _notes(saved: Saved, progress: Progress, run: RunConfig) -> Iterator[str]:
    """Notes on the allowed differences whose effect is not obvious."""
    if saved.get("global_batch_size") is not None and run.training.train_samples is None:
        theirs, ours = running_batch(run_of(saved)), running_batch(run)
        if theirs != ours:
            yield (
                f"WARNING: global batches of {ours} samples, {theirs} in the checkpoint: the schedule, in "
                f"iterations, goes on at iteration {progress.iteration} of {run.training.train_iters}"
            )
    for name in LOSS_FLAGS:
        their = saved.get(name)
        if their is not None and bool(their) != bool(run.get(name)):
            flag = "--" + name.replace("_", "-")
            yield f"WARNING: {flag} differs from the checkpoint's: losses before and after do not compare"
    if run.checkpoint.no_load_optim:
        yield "WARNING: --no-load-optim: the schedule starts over with the optimizer, from iteration 0"
