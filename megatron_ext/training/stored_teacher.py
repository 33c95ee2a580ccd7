"""Learning from targets that a teacher predicted before (``--teacher-logits``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.data.identity import identify, probe
from megatron_ext.data.indexed import DatasetError
from megatron_ext.data.rounds.dataset import NumberedDataset, RoundDataset
from megatron_ext.data.teacher_store import TargetStore, TaughtSamples, require_same_targets
from megatron_ext.data.views import Chained
from megatron_ext.kernels.teacher_targets import TopTargets
from megatron_ext.platform.collective import on_every_rank, on_first_rank, print_rank_0
from megatron_ext.tokenizer import Tokenizer
from megatron_ext.training.batch import Batch, Microbatches, next_batch
from megatron_ext.training.data import Datasets
from megatron_ext.training.state import Progress
from megatron_ext.training.taught import GivesTargets

_ADVICE = "Record targets for this run (--record-teacher-logits), or train with the flags of the recording"


class StoredTeacher(GivesTargets):
    """Gives each microbatch of the student the targets that its samples have in a store."""

    def __init__(self, run: RunConfig, store: TargetStore) -> None:
        super().__init__(run.distillation)
        self.temperature = store.manifest["temperature"]

    def training_data(self, iterators: Sequence[Microbatches | None]) -> Sequence[Microbatches | None]:
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return iterators
        *others, self.source = iterators  # the last chunk has the loss
        return [*others, self]

    def __next__(self) -> Batch:
        assert self.source is not None  # the last stage reads data
        sample: Any = next(self.source)
        batch = next_batch(iter([sample]))
        assert batch is not None
        return replace(batch, targets=self._targets(sample), alpha=self.alpha) if self.alpha else batch

    def _targets(self, sample: dict[str, torch.Tensor]) -> TopTargets:
        """The targets of a microbatch, as the loss has its axes."""
        ids, logprobs, rest = (
            sample[f"teacher_{name}"].to(platform.current_device(), non_blocking=True).transpose(0, 1)
            for name in ("ids", "logprobs", "rest")
        )
        mask = rest >= 0
        return TopTargets(ids.long(), logprobs.float(), rest.clamp(min=0.0), self.temperature, mask)


def stored_teacher(
    run: RunConfig, tokenizer: Tokenizer, datasets: Datasets, progress: Progress
) -> tuple[StoredTeacher | None, Datasets]:
    """The teacher of ``--teacher-logits``, and the datasets with its targets; a collective call.

    Without the flag: None, and the datasets unchanged.

    Raises:
        DatasetError: on every rank, if the store is damaged, or holds other targets than this run needs.
    """
    flags = run.distillation
    if (path := flags.teacher_logits) is None or not flags.distillation_alpha:
        return None, datasets
    train, *others = datasets
    assert train is not None  # a run that is taught trains
    store = on_every_rank(lambda: TargetStore.open(path))
    on_first_rank(lambda: _require_its_samples(store, run, tokenizer, train, progress))
    print_rank_0(
        f" teacher: the {store.format.top_k} largest probabilities of each token, stored in {store.path}, "
        f"{store.format.bytes_per_token:.0f} bytes a token"
    )
    if not isinstance(train, NumberedDataset):
        train = NumberedDataset(train)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        train = TaughtSamples(train, store)
    return StoredTeacher(run, store), (train, *others)


def _require_its_samples(
    store: TargetStore, run: RunConfig, tokenizer: Tokenizer, train: Any, progress: Progress
) -> None:
    """Raise DatasetError unless the store holds the targets of this training set."""
    name = f"--teacher-logits {store.path}"
    if isinstance(train, RoundDataset):  # numbered by the first round's set, which it contains
        base, samples = train.dataset, train.base_samples
    else:
        assert progress.training_set is not None  # set in every run that trains
        base, samples = train, min(progress.training_set["samples"], len(train))
        if isinstance(train, Chained):
            raise DatasetError(
                f"{name}: holds the first {len(store):,} samples, and this run, which goes on for longer "
                "than it was begun for, reads more: train without it"
            )
    flags = run.distillation
    wanted: dict[str, Any] = {
        "dataset": identify(run, tokenizer, samples) | {"probe": probe(base, samples)},
        "targets": {"seq_length": run.data.seq_length, "vocab_size": tokenizer.vocab_size},
        "reading": reading(run),
        "temperature": flags.distillation_temperature,
    }
    if flags.distillation_top_k:
        wanted["targets"]["top_k"] = flags.distillation_top_k
    require_same_targets(store.manifest, wanted, name, _ADVICE)


def reading(run: RunConfig) -> dict[str, bool]:
    """What else than the data changes how a model reads its samples, for a manifest."""
    return {name: run.get(name) for name in ("reset_position_ids", "reset_attention_mask")}
