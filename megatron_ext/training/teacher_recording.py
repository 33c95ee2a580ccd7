"""Records the targets of a teacher for every sample of the training set (``--record-teacher-logits``)."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext import platform
from megatron_ext.arguments.vocabulary import settle_vocabulary
from megatron_ext.config import RunConfig
from megatron_ext.data import build_datasets
from megatron_ext.data.identity import dataset_hash, identify, probe
from megatron_ext.data.teacher_store import (
    TargetFormat,
    TargetPaths,
    Targets,
    TargetWriter,
    open_recording,
    packed,
)
from megatron_ext.data.views import Samples
from megatron_ext.kernels.gather import gathered
from megatron_ext.kernels.teacher_targets import TopTargets
from megatron_ext.platform.collective import on_every_rank, on_first_rank, print_rank_0
from megatron_ext.tokenizer import Tokenizer, build_tokenizer
from megatron_ext.training.batch import next_batch
from megatron_ext.training.data import dataset_sizes
from megatron_ext.training.recording import record_missing, unread
from megatron_ext.training.signals import StopSignals
from megatron_ext.training.stored_teacher import reading
from megatron_ext.training.teacher import Teacher, load_teacher
from megatron_ext.training.watchdog import Watchdog


class CollectedTargets:
    """Collects the records of samples, and gathers them on the rank that writes.

    The tensor parallel ranks of the last pipeline stage all have the targets; the first of them collects.
    """

    def __init__(self, like: TargetFormat) -> None:
        self.like = like
        self.numbers: list[Tensor] = []
        self.records: list[np.ndarray] = []
        self.collects = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        self.writes = self.collects and parallel_state.get_data_parallel_rank() == 0

    def add(self, numbers: Tensor, targets: TopTargets) -> None:
        """The targets, [s, b, k], of samples with these numbers, [b]."""
        if not self.collects:
            return
        mask = None if targets.mask is None else targets.mask.t()
        by_sample = (targets.ids.transpose(0, 1), targets.logprobs.transpose(0, 1), targets.rest.t())
        self.numbers.append(numbers)
        self.records.append(packed(Targets.of(*by_sample, mask), self.like))

    def take(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(numbers, records) of all data parallel ranks on the rank that writes, else None.

        A collective call of the collecting ranks, which all have the same number of samples.
        """
        if not self.collects or not self.records:
            return None
        raw = np.concatenate(self.records).view(np.uint8).reshape(-1, self.like.record.itemsize)
        own = torch.from_numpy(raw).to(platform.current_device())
        group = parallel_state.get_data_parallel_group()
        numbers, records = gathered(torch.cat(self.numbers), group), gathered(own, group)
        self.numbers, self.records = [], []
        if not self.writes:
            return None
        return numbers.cpu().numpy(), records.cpu().numpy().view(self.like.record)[:, 0]


def record_teacher_targets(
    run: RunConfig, watchdog: Watchdog | None = None, signals: StopSignals | None = None
) -> None:
    """Run the teacher over the training set of the student; a collective call.

    Every sample is read once, in order, at any tensor, pipeline and data parallel layout; a recording that
    was stopped or killed is resumed. Progress is noted in ``watchdog``; ``signals`` holds the stop signals
    received so far.

    Raises:
        DatasetError: on every rank, if the files hold other targets.
    """
    tokenizer = on_every_rank(lambda: build_tokenizer(run.tokenizer))
    print_rank_0(settle_vocabulary(run, tokenizer))
    teacher = load_teacher(run, tokenizer)
    wanted = dataset_sizes(run.training, run.validation)[0]
    dataset = build_datasets(run, tokenizer, (wanted, 0, 0))[0]
    samples, flags = min(wanted, len(dataset)), run.distillation
    path = flags.record_teacher_logits
    assert path is not None
    like = TargetFormat(
        run.data.seq_length, flags.distillation_top_k, tokenizer.vocab_size, flags.teacher_logits_dtype
    )
    manifest = on_first_rank(
        lambda: open_recording(path, _manifest(run, tokenizer, dataset, samples, teacher), like)
    )
    there = f", {manifest['recorded']:,} are there" if manifest["recorded"] else ""
    size = samples * like.record.itemsize / 2**30
    print_rank_0(
        f" recording the targets of {samples:,} samples{there}: {like.bytes_per_token:.1f} bytes a token, "
        f"{size:,.2f} GiB in all"
    )
    collected, unit = CollectedTargets(like), run.samples_at_once
    (source,) = unread(dataset, manifest, run, unit)

    def read(microbatches: int) -> tuple[np.ndarray, np.ndarray] | None:
        for asked in teacher.ask([next_batch(source) for _ in range(microbatches)]):
            if asked is not None and asked.hidden is not None:
                numbers, targets = asked.batch.sample_ids, teacher.targets(asked)
                assert numbers is not None and isinstance(targets, TopTargets)
                collected.add(numbers, targets)
        return collected.take()

    writer = TargetWriter(path, manifest) if collected.writes else None
    done = record_missing(read, unit, writer, manifest, run, watchdog, signals)
    print_rank_0(f" recorded {done:,} of {samples:,} samples in {TargetPaths.of(path).records}")


def _manifest(
    run: RunConfig, tokenizer: Tokenizer, dataset: Samples, samples: int, teacher: Teacher
) -> dict[str, object]:
    """Of a new recording; reads the data, so it is called on one rank."""
    identity = identify(run, tokenizer, samples) | {"probe": probe(dataset, samples)}
    identity["hash"] = dataset_hash(identity)
    return {
        "samples": samples,
        "dataset": identity,
        "teacher": teacher.identity,
        "reading": reading(run),
        "temperature": run.distillation.distillation_temperature,
    }
