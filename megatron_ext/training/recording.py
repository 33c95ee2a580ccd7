"""Records the loss of every training sample, of a frozen model or during training."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.arguments.vocabulary import settle_vocabulary
from megatron_ext.checkpoint import LoadedState, load_checkpoint
from megatron_ext.common.files import sha256_file
from megatron_ext.common.progress import Progress
from megatron_ext.config import RunConfig
from megatron_ext.data import build_datasets
from megatron_ext.data.identity import dataset_hash, identify, probe
from megatron_ext.data.indexed import DatasetError
from megatron_ext.data.rounds.dataset import NumberedDataset, RoundDataset
from megatron_ext.data.rounds.loss_record import LossRecord, open_record, record_paths
from megatron_ext.data.views import Chained, Samples, Span
from megatron_ext.kernels.gather import gathered
from megatron_ext.models.builder import build_model, half_precision
from megatron_ext.models.config import transformer_config
from megatron_ext.platform.collective import on_every_rank, on_first_rank, print_rank_0
from megatron_ext.tokenizer import Tokenizer, build_tokenizer
from megatron_ext.training.batch import Batch, LossCounter
from megatron_ext.training.callbacks import Callback, State
from megatron_ext.training.data import Datasets, chunk_iterators, dataset_sizes, pipeline_group
from megatron_ext.training.side import Side
from megatron_ext.training.signals import StopSignals
from megatron_ext.training.state import Progress as RunProgress
from megatron_ext.training.state import StepResult
from megatron_ext.training.step import evaluation_mode, forward_backward
from megatron_ext.training.stopping import Stopping
from megatron_ext.training.watchdog import Watchdog

#: Microbatches per pipeline stage in one pass, which keeps the bubble small.
MICROBATCHES_PER_STAGE = 16
#: Options that change a sample's loss but not its tokens.
OPTIONS = (
    "params_dtype",
    "eod_mask_loss",
    "reset_position_ids",
    "reset_attention_mask",
    "fp8",
    "softmax_vocab_size",
)


class SampleLosses:
    """Collects the losses of samples, and gathers them on the rank that writes.

    The tensor parallel ranks of the last pipeline stage all have the losses; the first of them collects.
    Call it with a microbatch and its losses [b, s].
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.collects = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        self.writes = self.collects and parallel_state.get_data_parallel_rank() == 0

    def __call__(self, batch: Batch, losses: Tensor) -> None:
        if self.collects:
            assert batch.sample_ids is not None  # the dataset numbers its samples
            mask = batch.loss_mask.double()
            sums = (losses.double() * mask).sum(1)
            self.rows.append(torch.stack([batch.sample_ids.double(), sums, mask.sum(1)], dim=1))

    def take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """(ids, mean losses, tokens) of all data parallel ranks on the rank that writes, else None.

        A collective call of the collecting ranks, which all have the same number of samples. float64
        represents ids exactly up to 2^53.
        """
        if not self.collects or not self.rows:
            return None
        rows = gathered(torch.cat(self.rows), parallel_state.get_data_parallel_group())
        self.rows = []
        if not self.writes:
            return None
        ids, sums, tokens = rows.cpu().numpy().T
        # A sample without a token to predict has no loss: 0, with 0 tokens.
        return ids.astype(np.int64), sums / np.maximum(tokens, 1), tokens.astype(np.int32)


class OnlineRecorder(Callback):
    """Records the loss of each sample during training.

    The collected losses are written before each checkpoint, so that a run resumed from it has recorded
    every sample that it will not train on again. The model changes between samples, so these losses differ
    from those of the final frozen model: the manifest says "online".
    """

    sees_losses = True
    EVERY = 64  # microbatches between two gatherings

    def __init__(self, path: str, manifest: dict[str, Any]):
        self.collected = SampleLosses()
        self.record = LossRecord(path, manifest) if self.collected.writes else None
        self.side = Side(f"--record-sample-loss {path}")

    def losses(self, batch: Batch, losses: Tensor) -> None:
        self.collected(batch, losses)

    def after_step(self, state: State, result: StepResult) -> None:
        """Gather every ``EVERY`` microbatches; a collective call of the data parallel ranks."""
        if len(self.collected.rows) >= self.EVERY:
            self._write()

    def before_save(self, state: State) -> None:
        """A run resumed from the checkpoint does not train on these samples again."""
        self.flush()

    def end(self, state: State) -> None:
        self.flush()

    def flush(self) -> None:
        """Try to write everything to disk; a collective call of the data parallel ranks.

        Losses that cannot be written stay in memory until the next call.
        """
        self._write()
        if (record := self.record) is not None:
            self.side.attempt(lambda: record.mark(force=True), now=True)

    def _write(self) -> None:
        rows = self.collected.take()
        if rows is not None and self.record is not None:
            self.record.write(*rows)


def describe(
    run: RunConfig, tokenizer: Tokenizer, dataset: Samples, samples: int, kind: str, model: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a new recording; reads the data, so it is called on one rank."""
    identity = identify(run, tokenizer, samples) | {"probe": probe(dataset, samples)}
    identity["hash"] = dataset_hash(identity)
    options = {name: str(run.get(name)) for name in OPTIONS}
    return {"kind": kind, "samples": samples, "dataset": identity, "model": model | options}


def begin_record(
    path: str,
    run: RunConfig,
    tokenizer: Tokenizer,
    dataset: Samples,
    samples: int,
    kind: str,
    model: dict[str, Any],
) -> dict[str, Any]:
    """Create or open the files of ``--record-sample-loss``; a collective call.

    ``dataset`` is Megatron-Core's, without a round around it. Returns the manifest on every rank.

    Raises:
        DatasetError: on every rank, if the files hold other losses.
    """

    def begin() -> dict[str, Any]:
        manifest = describe(run, tokenizer, dataset, samples, kind, model)
        sources = getattr(dataset, "dataset_index", None)
        return open_record(path, manifest, sources)

    return on_first_rank(begin)


def online_recorder(
    run: RunConfig, tokenizer: Tokenizer, datasets: Datasets, progress: RunProgress
) -> tuple[OnlineRecorder | None, Datasets]:
    """The recorder of ``--record-mode online`` and the datasets with numbered samples; a collective call.

    ``progress`` has the number of samples that the training set was shuffled for. Without
    ``--record-sample-loss``: None, and the datasets unchanged.
    """
    if (path := run.rounds.record_sample_loss) is None:
        return None, datasets
    train, *others = datasets
    if isinstance(train, RoundDataset):  # numbered by the first round's set, which it contains
        base, samples = train.dataset, train.base_samples
    else:
        assert train is not None and progress.training_set is not None  # set in every run that trains
        drawn, wanted = progress.training_set["samples"], dataset_sizes(run.training, run.validation)[0]
        if drawn != wanted or isinstance(train, Chained):
            raise DatasetError(
                f"--record-mode online: the samples have numbers as in the {drawn:,} that the run was begun "
                f"for, not in {wanted:,}: leave out --record-sample-loss, or give the length "
                "that it was begun with"
            )
        base, samples = train, min(drawn, len(train))
        train = NumberedDataset(train)
    manifest = begin_record(path, run, tokenizer, base, samples, "online", {})
    return OnlineRecorder(path, manifest), (train, *others)


def record_training_set(
    run: RunConfig, watchdog: Watchdog | None = None, signals: StopSignals | None = None
) -> None:
    """Run the frozen model of ``--load`` over the training set; a collective call.

    Forward only, at any tensor, pipeline and data parallel layout, without an optimizer. Every sample is
    evaluated once, in order; a recording that was stopped or killed is resumed. Progress is noted in
    ``watchdog``; ``signals`` holds the stop signals received so far.

    Raises:
        DatasetError: on every rank, if the file holds other losses.
        FileNotFoundError: there is no checkpoint.
    """
    tokenizer = on_every_rank(lambda: build_tokenizer(run.tokenizer))
    print_rank_0(settle_vocabulary(run, tokenizer))
    config = transformer_config(run)
    model = half_precision(build_model(config, run), config)
    path, load = run.rounds.record_sample_loss, run.checkpoint.load
    assert path is not None and load is not None  # recording_is_possible
    loaded = load_checkpoint(load, model=model, run=run, rng=False)
    if loaded is None:
        raise FileNotFoundError(f"--load {load}: no checkpoint found; losses are of a trained model")
    sizes = dataset_sizes(run.training, run.validation)
    dataset = build_datasets(run, tokenizer, sizes)[0]
    samples = min(sizes[0], len(dataset))
    manifest = begin_record(path, run, tokenizer, dataset, samples, "frozen", checkpoint_identity(loaded))
    there = f", {manifest['recorded']:,} are there" if manifest["recorded"] else ""
    print_rank_0(f" recording the losses of {samples:,} samples with {loaded.path}{there}")
    losses, group = SampleLosses(), pipeline_group(run.parallel)
    counter, unit = LossCounter(record=losses), run.samples_at_once * group
    iterators = unread(dataset, manifest, run, unit)

    def read(units: int) -> tuple[np.ndarray, ...] | None:
        forward_backward(iterators, model, run, counter, True, num_microbatches=units * group)
        return losses.take()

    record = LossRecord(path, manifest) if losses.writes else None
    with torch.no_grad(), evaluation_mode(model):
        done = record_missing(read, unit, record, manifest, run, watchdog, signals)
    print_rank_0(f" recorded {done:,} of {samples:,} losses in {record_paths(path).losses}")


def checkpoint_identity(loaded: LoadedState) -> dict[str, Any]:
    """Iteration and content hash of a checkpoint: the sha256 of the file that lists its files."""
    listings = (loaded.path / name for name in ("checksums.json", ".metadata", "metadata.json"))
    listing = next(path for path in listings if Path(path).is_file())
    return {"iteration": loaded.iteration, "sha256": sha256_file(listing)}


def unread(
    dataset: Samples, manifest: dict[str, Any], run: RunConfig, unit: int
) -> list[Iterator[dict[str, Any]] | None]:
    """The microbatches of the samples that are not recorded yet, in order, ``unit`` samples at a time."""
    span = Span(dataset, manifest["recorded"], manifest["samples"], unit)
    return chunk_iterators(span, run.but(dataloader_type="single"), 0)


class RecordWriter(Protocol):
    """Writes what is recorded of samples."""

    def write(self, *rows: Any) -> None: ...

    def mark(self, recorded: int, force: bool = False) -> None: ...


def record_missing(
    read: Callable[[int], tuple[np.ndarray, ...] | None],
    unit: int,
    writer: RecordWriter | None,
    manifest: dict[str, Any],
    run: RunConfig,
    watchdog: Watchdog | None,
    signals: StopSignals | None,
) -> int:
    """Record the missing samples, until the end or a reason to stop; returns how many are recorded.

    Args:
        read: evaluates so many times ``unit`` samples, and returns what ``writer`` takes on its rank.
    """
    done, samples = manifest["recorded"], manifest["samples"]
    note = watchdog.note if watchdog else lambda phase: None
    stopping = Stopping(replace(run.training, exit_interval=None), signals or StopSignals())
    with Progress("recording", samples, " samples", done, quiet=writer is None) as progress:
        while done < samples:
            note("recording")
            units = min(MICROBATCHES_PER_STAGE, -(-(samples - done) // unit))
            rows = read(units)
            done = min(done + units * unit, samples)
            if writer is not None and rows is not None:
                writer.write(*rows)
                writer.mark(done, force=done == samples)
            progress.add(done - progress.done)
            if reason := stopping.reason(0):
                print_rank_0(f"recording stops at sample {done:,}: {reason}; start again to go on")
                break
    if writer is not None:
        writer.mark(done, force=True)
    return done
