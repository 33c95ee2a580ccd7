"""The teacher of a student in training: loading it at the student's layout, and asking it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.arguments.of_checkpoint import arguments_of
from megatron_ext.arguments.vocabulary import settle_vocabulary
from megatron_ext.checkpoint import (
    LoadedState,
    load_checkpoint,
    read_checkpoint_args,
    weights_sha256,
)
from megatron_ext.config import RunConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange.as_checkpoint import as_checkpoint
from megatron_ext.kernels.documents import document_starts
from megatron_ext.kernels.teacher_targets import TeacherTargets, largest
from megatron_ext.models.builder import build_chunks
from megatron_ext.models.config import transformer_config
from megatron_ext.models.teacher import TeacherModel
from megatron_ext.platform.collective import on_every_rank, print_rank_0
from megatron_ext.tokenizer import Tokenizer, build_tokenizer
from megatron_ext.tokenizer.build import flags_of
from megatron_ext.tokenizer.fold import Fold, fold
from megatron_ext.tokenizer.rejoin import Rejoin
from megatron_ext.training.batch import Batch


@dataclass
class Asked:
    """A microbatch of the student, and the teacher's hidden states of it; None on all stages but the last."""

    batch: Batch
    rows: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Teacher:
    """A frozen model under the student's process groups, which holds the student's ``run``.

    Attributes:
        model: this stage of it.
        config: the whole model.
        rejoin: from the student's tokens to the teacher's; None if these are the same.
        end: the teacher's id of what ends a document in the student's data.
        identity: of what its predictions depend on, for a manifest.
    """

    run: RunConfig
    model: TeacherModel
    config: ModelConfig
    rejoin: Rejoin | None = None
    end: int = -1
    identity: dict[str, Any] = field(default_factory=dict)

    def read(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """What the teacher reads in place of the student's tokens, and where its targets are (``Rejoin``)."""
        if self.rejoin is None:
            return batch, None
        reading = self.rejoin.read(batch.tokens.cpu().numpy())
        device = batch.tokens.device
        tokens, rows = (torch.from_numpy(values).to(device) for values in reading)
        changes = {"tokens": tokens}
        apart, anew = batch.document_starts is not None, self.run.data.reset_position_ids
        if apart or anew:
            starts = document_starts(tokens == self.end)
            changes |= {"document_starts": starts} if apart else {}
            changes |= {"position_ids": torch.arange(tokens.size(1), device=device) - starts} if anew else {}
        return replace(batch, **changes), rows

    @torch.no_grad()
    def ask(self, batches: Sequence[Batch | None]) -> list[Asked | None]:
        """Run the teacher over microbatches of the student, on every stage; a collective call.

        A stage that reads no data gives None for each of them, and gets None back.
        """
        read = [(None, None) if batch is None else self.read(batch) for batch in batches]
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([batch for batch, _ in read]),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=self.run.data.seq_length,
            micro_batch_size=self.run.training.micro_batch_size,
            forward_only=True,
        )
        hidden = outputs or [None] * len(batches)
        return [
            None if batch is None else Asked(batch, rows, states)
            for batch, (_, rows), states in zip(batches, read, hidden, strict=True)
        ]

    def targets(self, asked: Asked) -> TeacherTargets:
        """What the teacher predicts for a microbatch, on the last stage; a collective call there."""
        assert asked.hidden is not None  # on the last stage
        flags = self.run.distillation
        whole = self.model.predict(asked.hidden, asked.rows, flags.distillation_temperature)
        if not flags.distillation_top_k:
            return whole
        group = parallel_state.get_tensor_model_parallel_group()
        first, rows = group.rank() * self.model.width, self.run.model.softmax_vocab_size
        return largest(whole, flags.distillation_top_k, first, group, rows)


def _forward_step(iterator: Iterator[Batch | None], model: nn.Module) -> tuple[Tensor, None]:
    """One microbatch through this stage; the schedule keeps what the last one returns."""
    batch = next(iterator)
    if batch is None:
        return model(None, None, None), None
    return model(batch.tokens, batch.position_ids, batch.document_starts), None


def load_teacher(run: RunConfig, tokenizer: Tokenizer) -> Teacher:
    """The model of ``--teacher-load`` at the layout of the student's ``run``; a collective call.

    A Hugging Face folder is written as a checkpoint first (``as_checkpoint``). On a CPU, where bf16 is slow,
    it computes in fp32; on a GPU in the format of its checkpoint.

    Raises:
        RunError: on every rank, if it does not fit the student's layout, sequences or tokenizer.
        CheckpointError, InterchangeError: it cannot be read.
    """
    flags, flag = run.distillation, f"--teacher-load {run.distillation.teacher_load}"
    assert flags.teacher_load is not None
    with as_checkpoint(flags.teacher_load, flags.teacher_tokenizer_model) as folder:
        theirs = on_every_rank(lambda: _configuration(run, folder), f"use {flag}")
        reads, folded = on_every_rank(lambda: _vocabularies(run, theirs, tokenizer), f"use {flag}")
        config = transformer_config(theirs)
        model = build_chunks(TeacherModel, config, theirs, parallel_output=True, initialized=False)
        loaded = load_checkpoint(folder, model=list(model), run=theirs, rng=False)
        assert loaded is not None  # its arguments were read
        identity = on_every_rank(lambda: _identity(loaded, theirs))
    (stage,) = model
    parallel = parallel_state.get_tensor_model_parallel_world_size()
    assert run.model.padded_vocab_size is not None  # settled
    rows = theirs.model.padded_vocab_size
    assert rows is not None  # settled
    onto = None if folded is None else torch.from_numpy(folded.columns(rows))
    stage.face(run.model.padded_vocab_size // parallel, onto)
    print_rank_0(_line(flag, theirs, folded))
    end = -1 if folded is None else int(folded.teacher_of_student[tokenizer.eod])
    return Teacher(run, stage.eval(), theirs.model, reads, end, identity)


def _configuration(run: RunConfig, folder: str) -> RunConfig:
    """The teacher's model, at the student's layout and on its device."""
    saved = read_checkpoint_args(folder)
    if saved is None:
        raise FileNotFoundError("no checkpoint found")
    given: dict[str, Any] = {
        "sequence_parallel": run.parallel.sequence_parallel,
        "micro_batch_size": run.training.micro_batch_size,
        "seq_length": run.data.seq_length,
        "device": run.process.device,
        "distributed_backend": run.process.distributed_backend,
        "transformer_impl": run.layers.transformer_impl,
        "deterministic_mode": run.layers.deterministic_mode,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    parallel = run.parallel
    layout = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    theirs = arguments_of(saved, folder, None, layout, **given)
    if not platform.on_gpu():
        theirs = theirs.but(bf16=False, fp16=False, params_dtype=torch.float32)
    return theirs


def _vocabularies(
    run: RunConfig, theirs: RunConfig, tokenizer: Tokenizer
) -> tuple[Rejoin | None, Fold | None]:
    """How the teacher's vocabulary becomes the student's; settles that of ``theirs``."""
    path = run.distillation.teacher_tokenizer_model
    if path is not None:
        theirs.tokenizer = flags_of(path)
    own = build_tokenizer(theirs.tokenizer)
    settle_vocabulary(theirs, own)
    folded = fold(tokenizer, own)
    if folded is None:
        return None, None
    return Rejoin(folded, tokenizer, own), folded


def _identity(loaded: LoadedState, theirs: RunConfig) -> dict[str, Any]:
    """For a manifest of what the teacher predicts; of a Hugging Face folder the same whenever it is read."""
    return {
        "sha256": weights_sha256(loaded.path),
        "tokenizer_sha256": build_tokenizer(theirs.tokenizer).sha256,
        "params_dtype": str(theirs.precision.params_dtype),
    }


def _line(flag: str, theirs: RunConfig, folded: Fold | None) -> str:
    """For the log."""
    dtype = str(theirs.precision.params_dtype).removeprefix("torch.")
    line = f" teacher: {flag}, {theirs.model.num_parameters:,} parameters in {dtype}"
    if folded is not None:
        rows, kept = len(folded.student_of_teacher), len(folded.teacher_of_student)
        line += f"; {rows - kept:,} of its {rows:,} tokens are folded onto the student's"
    return line
