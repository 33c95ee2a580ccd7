"""Data in stages: the stage that a run is in, the data of the next ones, and the change from one to another.

All datasets are built at the start. The training sets lie one behind the other in one dataset, so that the
data workers read on over a boundary; the number of consumed samples alone says where a run is.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.arguments.defaults import running_batch
from megatron_ext.arguments.stages import Planned, Point, planned
from megatron_ext.checkpoint import CheckpointError
from megatron_ext.config import RunConfig
from megatron_ext.data import DatasetError, build_datasets
from megatron_ext.data.stages import Stage, read_stages
from megatron_ext.data.views import Chained
from megatron_ext.platform.collective import on_every_rank, print_rank_0
from megatron_ext.tokenizer import Tokenizer
from megatron_ext.training.callbacks import Callback, State
from megatron_ext.training.continuing import Start, described
from megatron_ext.training.data import Datasets, dataset_sizes, print_data_summary, validation_iterators
from megatron_ext.training.state import Progress


def enter_stage(start: Start, run: RunConfig) -> list[Planned]:
    """Find the stage that the run is in, and make ``run`` read its data; a collective call.

    Returns that stage and those after it, nothing without ``--data-stages``.

    Raises:
        CheckpointError, DatasetError: on every rank, if the stages are not those of the checkpoint so far, or
            one has no iteration.
    """
    progress, path = start.progress, run.data.data_stages
    if not isinstance(progress.stages, list) or not all(isinstance(each, dict) for each in progress.stages):
        progress.stages, progress.stage = None, 0
    if path is None:
        if progress.stages and not run.data.override_training_set:
            raise CheckpointError(
                f"the run in {start.folder} is in stage {progress.stage + 1} of its --data-stages: give the "
                "file; --override-training-set goes on with other data, from their beginning"
            )
        progress.stages, progress.stage = None, 0
        return []
    stages = on_every_rank(lambda: read_stages(path), error=DatasetError)
    at = Point(progress.iteration, progress.consumed_train_samples)
    if changed := list(_changes_of_the_past(progress, stages, at, run)):
        raise CheckpointError(
            f"--data-stages {path}: the stages that the run in {start.folder} has begun were others: "
            f"{'; '.join(changed)}. Only those that have not begun may change; --finetune begins a new run "
            "with the weights alone"
        )
    ours = [stage.described() for stage in stages]
    if progress.stages is not None and ours != progress.stages:
        after = stages[progress.stage].name
        print_rank_0(f" --data-stages: the stages after {after} differ from those of the checkpoint")
    progress.stages = ours

    def plan() -> tuple[list[Planned], RunConfig]:
        found = planned(stages[progress.stage :], run, at, progress.round_start)
        return found, found[0].of(run)

    found, here = on_every_rank(plan, error=DatasetError)
    run.data = here.data
    print_rank_0(in_words(found[0], progress))
    return found


def _changes_of_the_past(
    progress: Progress, stages: Sequence[Stage], at: Point, run: RunConfig
) -> Iterator[str]:
    """What is another in the stages that have begun, a phrase each, and a later one that should have."""
    for theirs, ours in zip((progress.stages or [])[: progress.stage + 1], stages, strict=False):
        for field, value in ours.described().items():
            if theirs.get(field) != value:
                yield f"stage {ours.name}: {field}: {theirs.get(field)} there, {value} here"
    if progress.stage >= len(stages):
        yield f"it is in stage {progress.stage + 1}, and there are {len(stages)} here"
    for stage in stages[progress.stage + 1 : progress.stage + 2]:
        late = stage.from_iteration is not None and stage.from_iteration < at.iteration
        if late or (stage.from_sample is not None and stage.from_sample <= at.samples - running_batch(run)):
            yield f"stage {stage.name} would have begun before iteration {at.iteration}"


def in_words(stage: Planned, progress: Progress) -> str:
    """The stage that the run is in, as the log announces it."""
    shares = zip(stage.stage.shares(stage.tokens), stage.stage.blend, strict=True)
    blend = " + ".join(f"{share:.3g} {Path(source.prefix).name}" for share, source in shares)
    return (
        f" data stage {stage.stage.name} ({progress.stage + 1} of {len(progress.stages or ())}) to iteration "
        f"{stage.end.iteration}: {blend}, sequences of {stage.seq_length}"
    )


class Built(NamedTuple):
    """A stage that has not ended, with its data.

    Attributes:
        run: whose data flags are the stage's.
        samples: of the training set that are read.
        description: of the training set, for checkpoints.
    """

    stage: Planned
    run: RunConfig
    datasets: Datasets
    samples: int
    description: dict[str, Any]


class StageChange(Callback):
    """Begins the next stage once the samples of the current one are consumed."""

    def __init__(
        self, stages: Sequence[Planned], run: RunConfig, tokenizer: Tokenizer, datasets: Datasets, begun: int
    ) -> None:
        """Builds the datasets of all stages after the first; a collective call.

        ``datasets`` are the first's, of which the training set has been read since ``begun`` samples.
        """
        self.built = [Built(stages[0], run, datasets, stages[0].end.samples - begun, {})]
        for stage in stages[1:]:
            there = stage.of(run)
            sizes = (stage.samples, *dataset_sizes(run.training, run.validation)[1:])
            print_rank_0(f" data stage {stage.stage.name}, from iteration {stage.begin.iteration}:")
            found = build_datasets(there, tokenizer, sizes)
            description = described(there, tokenizer, stage.samples)
            self.built.append(Built(stage, there, found, stage.samples, description))
            print_data_summary(found, stage.samples, there)

    def datasets(self) -> Datasets:
        """(training sets from the current stage on, its validation set, its test set)."""
        _, valid, test = self.built[0].datasets
        sets = [each.datasets[0] for each in self.built]
        counts = [each.samples for each in self.built]
        return Chained([train for train in sets if train is not None], counts), valid, test

    def before_step(self, state: State) -> None:
        progress, run = state.progress, state.run
        if len(self.built) == 1 or progress.consumed_train_samples < self.built[1].stage.begin.samples:
            return
        state.callbacks("stage_ends", state)
        del self.built[0]
        now = self.built[0]
        assert progress.consumed_train_samples == now.stage.begin.samples
        run.data, progress.training_set = now.run.data, now.description
        progress.stage, progress.round_start = progress.stage + 1, progress.consumed_train_samples
        state.datasets = self.datasets()
        if not run.validation.full_validation:
            consumed = progress.consumed_valid_samples
            state.valid_iterators = validation_iterators(state.datasets[1], run, consumed)
        print_rank_0(in_words(now.stage, progress))
