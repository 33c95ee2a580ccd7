"""A teacher's targets against transformers' logits of its Hugging Face folder, folded by the definition."""

import shutil

import numpy as np
import pytest
import torch
import transformers

from megatron_ext.tokenizer.build import SentencePieceTokenizer
from megatron_ext.tokenizer.fold import fold
from megatron_ext.tokenizer.rejoin import Rejoin
from tests.functional.test_run import BASE
from tests.helpers.teachers import of_two_vocabularies
from tests.helpers.training import flags
from tests.unit.data import corpora
from tests.unit.interchange import toys

TEMPERATURE, PIECES, ROWS, LENGTH = 1.7, 390, 400, 32
LAYOUTS = [
    (1, {}),
    (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    (2, {"pipeline_model_parallel_size": 2}),
]


def targets_of(argv: list[str], tokens: torch.Tensor):
    """(tensor parallel rank, shard of the logits, mask) of this rank's targets; None on other stages."""
    from megatron_ext.arguments import parse_args
    from megatron_ext.arguments.vocabulary import settle_vocabulary
    from megatron_ext.kernels.documents import document_starts
    from megatron_ext.tokenizer import build_tokenizer
    from megatron_ext.training import distributed
    from megatron_ext.training.batch import Batch
    from megatron_ext.training.teacher import load_teacher

    run = parse_args(argv)
    distributed.initialize(run)
    tokenizer = build_tokenizer(run.tokenizer)
    settle_vocabulary(run, tokenizer)
    teacher = load_teacher(run, tokenizer)
    starts = document_starts(tokens == tokenizer.eod) if run.data.reset_attention_mask else None
    positions = torch.arange(LENGTH) - (0 if starts is None else starts)
    batch = Batch(tokens, tokens, torch.ones(tokens.shape), positions.expand_as(tokens), starts)
    (asked,) = teacher.ask([batch])
    targets = None if asked.hidden is None else teacher.targets(asked)
    rank = torch.distributed.get_rank() if run.parallel.tensor_model_parallel_size > 1 else 0
    distributed.finalize()
    return None if targets is None else (rank, targets.logits, targets.mask)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of the student's data, its tokenizer, the teacher's, and some text in the student's tokens."""
    folder = tmp_path_factory.mktemp("vocabularies")
    theirs, mine = (values["tokenizer_model"] for values in of_two_vocabularies(folder))
    student = SentencePieceTokenizer(mine)
    ids = np.concatenate([student.tokenize(text) for text in corpora.documents(20, seed=5) if text])
    return folder, student, SentencePieceTokenizer(theirs), ids[: 2 * LENGTH].reshape(2, LENGTH)


def predictions(reference, tokens: np.ndarray, end: int | None) -> np.ndarray:
    """transformers' distributions [b, s, v], each document by itself if ``end`` ends them."""
    result = []
    for row in tokens:
        cuts = [] if end is None else np.flatnonzero(row[:-1] == end) + 1
        with torch.no_grad():
            parts = [reference(torch.from_numpy(part)[None]).logits[0] for part in np.split(row, cuts)]
        result.append(torch.softmax(torch.cat(parts)[:, :PIECES].double() / TEMPERATURE, -1).numpy())
    return np.stack(result)


def test_documents_are_apart_for_the_teacher_as_well(pool, tmp_path, world):
    """Where its tokens lie, which are fewer than the student's."""
    folder, student, teacher, tokens = world
    tokens = tokens.copy()
    tokens[0, [9, 20]] = tokens[1, 14] = student.eod
    hf = toys.folder(tmp_path / "hf", "qwen3", 2, False, vocab_size=ROWS)
    shutil.copy(folder / "tiny.model", hf / "tokenizer.model")
    values = BASE | dict(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=folder / "compact.model", vocab_size=None,
        teacher_load=hf, distillation_temperature=TEMPERATURE, reset_attention_mask=True,
        reset_position_ids=True, seq_length=LENGTH,
    )  # fmt: skip
    ((_, logits, mask),) = pool.run(1, targets_of, flags(**values), torch.from_numpy(tokens))
    q = torch.softmax(logits[..., : student.vocab_size].double() / TEMPERATURE, -1).transpose(0, 1)
    folded = fold(student, teacher)
    reading = Rejoin(folded, student, teacher).read(tokens)
    reference = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    expected = predictions(reference, reading.tokens, teacher.eod)
    expected = folded.fold(np.take_along_axis(expected, reading.rows.clip(0)[..., None], axis=1))
    there = reading.rows >= 0
    np.testing.assert_allclose(q[mask.t()].numpy(), expected[there], rtol=3e-4, atol=1e-7)


@pytest.mark.parametrize("same", [False, True], ids=["cut", "same"])
@pytest.mark.parametrize(("maker", "tied"), [("granite", True), ("qwen3", False)])
@pytest.mark.parametrize(("processes", "layout"), LAYOUTS, ids=["1p", "tp2-sp", "pp2"])
def test_the_targets_are_the_folded_distribution(pool, tmp_path, world, processes, layout, maker, tied, same):
    folder, student, teacher, tokens = world
    if same:
        student = teacher
    hf = toys.folder(tmp_path / "hf", maker, 2, tied, vocab_size=ROWS)
    shutil.copy(folder / "tiny.model", hf / "tokenizer.model")
    path = folder / ("tiny.model" if same else "compact.model")
    values = BASE | layout | dict(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=path, vocab_size=None, teacher_load=hf,
        distillation_temperature=TEMPERATURE, seq_length=LENGTH,
    )  # fmt: skip
    found = pool.run(processes, targets_of, flags(**values), torch.from_numpy(tokens), timeout=120)
    shards = sorted((each for each in found if each is not None), key=lambda each: each[0])
    logits = torch.cat([shard for _, shard, _ in shards], dim=-1)[..., : student.vocab_size]
    q = torch.softmax(logits.double() / TEMPERATURE, -1).transpose(0, 1)

    reference = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    folded = fold(student, teacher)
    reading = None if folded is None else Rejoin(folded, student, teacher).read(tokens)
    expected = predictions(reference, tokens if reading is None else reading.tokens, None)
    if reading is None:
        assert shards[0][2] is None and folded is None
    else:
        mask = shards[0][2].transpose(0, 1)
        assert torch.equal(mask, torch.from_numpy(reading.rows >= 0)) and 0.2 < mask.float().mean() < 0.9
        q = q[mask]
        expected = np.take_along_axis(expected, reading.rows.clip(0)[..., None], axis=1)
        expected = folded.fold(expected)[reading.rows >= 0]
    np.testing.assert_allclose(q.numpy(), expected, rtol=3e-4, atol=1e-7)
