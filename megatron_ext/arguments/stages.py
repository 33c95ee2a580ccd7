"""Where the stages of ``--data-stages`` begin and end in a run, and the run that each of them is."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megatron_ext.arguments.defaults import iterations_left, running_batch
from megatron_ext.config import RunConfig
from megatron_ext.data.errors import DatasetError
from megatron_ext.data.stages import Stage, read_stages, sources_of_words


class Point(NamedTuple):
    """A point between two iterations."""

    iteration: int
    samples: int


START = Point(0, 0)


@dataclass(frozen=True)
class Planned:
    """A stage with its place in the run."""

    stage: Stage
    begin: Point
    end: Point
    seq_length: int

    @property
    def samples(self) -> int:
        return self.end.samples - self.begin.samples

    @property
    def tokens(self) -> int:
        return self.samples * self.seq_length

    def of(self, run: RunConfig) -> RunConfig:
        """The run that reads this stage's data; raises DatasetError if its sources do not fit into it."""
        name = "data_path" if run.data.is_split else "train_data_path"
        words = {name: self.stage.words(self.tokens), "seq_length": self.seq_length}
        return run.but(**words, stage=self.stage.name, stage_end=self.end.samples)


def planned(stages: Sequence[Stage], run: RunConfig, at: Point = START, begun: int = 0) -> list[Planned]:
    """The stages from ``at`` on, the first of which began after ``begun`` samples.

    Raises:
        DatasetError: a stage would have no iteration.
    """
    train = run.training
    last = (
        train.train_iters if train.train_samples is None else at.iteration + iterations_left(run, at.samples)
    )
    begins = [Point(at.iteration, begun), *(begin(stage, run, at) for stage in stages[1:])]
    ends = [*begins[1:], reach(run, at, iteration=max(last, at.iteration))]
    for stage, (one, other) in zip(stages, pairwise([*begins, ends[-1]]), strict=True):
        if other.samples <= one.samples:
            raise DatasetError(
                f"stage {stage.name}: it would begin at iteration {one.iteration}, and what follows it, at "
                f"iteration {other.iteration}: it has no iteration of its own"
            )
    return [
        Planned(stage, begin, end, stage.seq_length or run.data.seq_length)
        for stage, begin, end in zip(stages, begins, ends, strict=True)
    ]


def begin(stage: Stage, run: RunConfig, at: Point) -> Point:
    """The first point, not before ``at``, at which a stage has begun."""
    return reach(run, at, stage.from_iteration, stage.from_sample)


def reach(run: RunConfig, at: Point, iteration: int | None = None, samples: int | None = None) -> Point:
    """The first point from ``at`` on with so many iterations, or so many samples."""
    done, read = at
    while done < iteration if iteration is not None else read < (samples or 0):
        batch, ramp = running_batch(run, read), run.training.rampup_batch_size
        steps = 1
        if not ramp or read > ramp[2]:  # the batch stays
            steps = iteration - done if iteration is not None else -(-((samples or 0) - read) // batch)
        done, read = done + steps, read + steps * batch
    return Point(done, read)


def plan_of_run(run: RunConfig) -> list[Planned]:
    """The stages of a run from its beginning.

    A run of one dataset or weighted blend on the command line is a stage without a name; other data, none.
    """
    if run.data.data_stages:
        return planned(read_stages(run.data.data_stages), run)
    problems: list[str] = []
    blend = sources_of_words(run.data.data_path or run.data.train_data_path or (), problems.append)
    return planned([Stage("", blend)], run) if blend and not problems else []


def training_share(run: RunConfig) -> float:
    """The share of each dataset's documents that is in the training set."""
    if not run.data.is_split:
        return 1.0
    shares = [float(share) for share in (run.data.split or "1").split(",")]
    return shares[0] / sum(shares)


def at_its_longest(run: RunConfig) -> RunConfig:
    """The run with the longest sequences of its stages, which need most memory."""
    if not run.data.data_stages:
        return run
    lengths = (stage.seq_length or run.data.seq_length for stage in read_stages(run.data.data_stages))
    return run.but(seq_length=max(lengths))
