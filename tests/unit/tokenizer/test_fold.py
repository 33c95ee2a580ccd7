"""A teacher's distribution in a compact tokenizer's tokens, against all texts of a toy language."""

import itertools
import random
from collections import defaultdict

import numpy as np
import pytest
import tokenizers

from megatron_ext.tokenizer.bits_per_byte import BYTE_LEVEL_ALPHABET
from megatron_ext.tokenizer.build import (
    HuggingFaceTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from megatron_ext.tokenizer.compress_huggingface import Drop, HuggingFaceModel
from megatron_ext.tokenizer.compress_sentencepiece import SentencePieceModel
from megatron_ext.tokenizer.fold import FoldError, fold
from megatron_ext.tokenizer.hf_folder import HuggingFaceFolder, write_folder
from megatron_ext.tokenizer.rejoin import Rejoin
from tests.unit.tokenizer import sample_bpe
from tests.unit.tokenizer import sample_models as samples

KINDS = ("sentencepiece", "byte-level")
MERGES = [("a", "b"), ("ab", "ab"), ("ab", "c"), ("abc", "abc"), ("c", "a")]
DROPPED = {"abc", "abcabc", "ca"}
END = -1


def tokenizers_of(kind, folder, merges=MERGES, dropped=DROPPED) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer with the merges, and the compact one without the pieces ``dropped``."""
    make = _sentencepiece if kind == "sentencepiece" else _byte_level
    return make(folder, merges, dropped)


def _sentencepiece(folder, merges, dropped):
    def change(proto):
        own = [piece for piece in proto.pieces if piece.type not in (samples.NORMAL, samples.USER_DEFINED)]
        names = ["".join(pair) for pair in merges] + list("abc")
        del proto.pieces[:]
        proto.pieces.extend(own)
        for rank, name in enumerate(names):
            proto.pieces.add(piece=name, score=-rank, type=samples.NORMAL)
        proto.normalizer_spec.add_dummy_prefix = False
        proto.trainer_spec.vocab_size = len(proto.pieces)

    full = SentencePieceModel(samples.changed(samples.trained(user_defined_symbols=""), change))
    kept = np.array([i for i, piece in enumerate(full.proto.pieces) if piece.piece not in dropped])
    models = full, full.compressed(kept, np.ones((1, len(full.proto.pieces))))
    for name, model in zip(("full", "compact"), models, strict=True):
        (folder / name).write_bytes(model.data)
    return SentencePieceTokenizer(folder / "full"), SentencePieceTokenizer(folder / "compact")


def _byte_level(folder, merges, dropped):
    alphabet = sorted(BYTE_LEVEL_ALPHABET)
    vocab = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<unused>"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    files = HuggingFaceFolder.alone("toy", backend.to_str().encode(), "sha", config)
    full = HuggingFaceModel(files, Drop(patterns=["<unused>"]))
    gone = dropped | {"<unused>"}
    kept = np.array([i for i, piece in enumerate(full.bpe.pieces) if piece not in gone])
    models = full, full.compressed(kept, np.ones((1, len(full.bpe.pieces))))
    for name, model in zip(("full", "compact"), models, strict=True):
        write_folder(folder / name, model.folder.files)
    return tuple(HuggingFaceTokenizer(folder / name, use_fast=True) for name in ("full", "compact"))


class Language:
    """All texts of a length over three letters, with their probabilities, and a teacher that knows them."""

    def __init__(self, teacher: Tokenizer, student: Tokenizer, length: int) -> None:
        texts = ["".join(letters) for letters in itertools.product("abc", repeat=length)]
        self.probabilities = np.random.default_rng(1).dirichlet(np.full(len(texts), 0.3))
        self.teacher, self.student = teacher, student
        self.theirs = [(*teacher.tokenize(text), teacher.eod) for text in texts]
        self.mine = [(*student.tokenize(text), student.eod) for text in texts]

    def __iter__(self):
        return zip(self.probabilities, self.theirs, self.mine, strict=True)

    def predictions(self) -> dict[tuple[int, ...], np.ndarray]:
        """Of each beginning in the teacher's tokens the distribution of the next one."""
        mass = defaultdict(lambda: np.zeros(self.teacher.vocab_size))
        for probability, theirs, _ in self:
            for i, token in enumerate(theirs):
                mass[theirs[:i]][token] += probability
        return {beginning: each / each.sum() for beginning, each in mass.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_fold_is_the_sum_over_all_continuations(kind, tmp_path):
    teacher, student = tokenizers_of(kind, tmp_path)
    folded = fold(student, teacher)
    mass = defaultdict(lambda: np.zeros(student.vocab_size))
    language = Language(teacher, student, length=6)
    sizes = [tokenizer.token_bytes().tolist() for tokenizer in (teacher, student)]
    for probability, theirs, mine in language:
        begins = {end: i for i, end in enumerate(ends(mine[:-1], sizes[1]), start=1)} | {0: 0}
        for i, end in enumerate([0, *ends(theirs[:-1], sizes[0])]):
            mass[theirs[:i]][mine[begins[end]]] += probability
    predictions = language.predictions()
    assert len(mass) == len(predictions) > 200
    for beginning, each in mass.items():
        np.testing.assert_allclose(folded.fold(predictions[beginning]), each / each.sum(), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_where_the_teacher_has_them_and_the_text_elsewhere_are_the_students_distribution(
    kind, tmp_path
):
    """In the mean over all texts, after every beginning in the student's tokens."""
    teacher, student = tokenizers_of(kind, tmp_path)
    folded = fold(student, teacher)
    rejoin = Rejoin(folded, student, teacher)
    language = Language(teacher, student, length=6)
    predictions = language.predictions()
    true, learned = (defaultdict(lambda: np.zeros(student.vocab_size)) for _ in range(2))
    inside = 0.0
    for probability, theirs, mine in language:
        read, rows = (each[0] for each in rejoin.read(np.array([mine])))
        assert tuple(read[: len(theirs)]) == theirs
        for i in range(len(mine) - 1):
            text = np.eye(student.vocab_size)[mine[i + 1]]
            target = folded.fold(predictions[theirs[: rows[i] + 1]]) if rows[i] >= 0 else text
            true[mine[: i + 1]] += probability * text
            learned[mine[: i + 1]] += probability * target
            inside += probability * (rows[i] < 0)
    assert inside > 0.3
    for beginning, each in true.items():
        np.testing.assert_allclose(learned[beginning], each, atol=1e-12)


def test_what_the_teacher_reads_in_a_batch(tmp_path):
    teacher, student = tokenizers_of("byte-level", tmp_path)
    a, b, c, abc, abcabc, end = teacher.tokenizer.convert_tokens_to_ids(
        ["a", "b", "c", "abc", "abcabc", "<end>"]
    )
    texts = ["abcabcb", "cbabca"]
    tokens = np.array([[*student.tokenize(text), student.eod] for text in texts])
    tokens, rows = Rejoin(fold(student, teacher), student, teacher).read(tokens)
    assert tokens.tolist() == [[abcabc, b, end, end, end, end], [c, b, abc, a, end, end]]
    assert rows.tolist() == [[-1, -1, -1, 0, 1, 2], [0, 1, -1, 2, 3, 4]]


def test_known_limit_a_part_of_a_dropped_piece_merges_with_what_follows(tmp_path):
    """Without "ab", "abc" is "a" and "bc" to the student, not found to be the teacher's "ab" and "c"."""
    teacher, student = tokenizers_of("byte-level", tmp_path, [("a", "b"), ("b", "c")], {"ab"})
    tokens = np.array([student.tokenize("abca")])
    read, rows = Rejoin(fold(student, teacher), student, teacher).read(tokens)
    assert read.tolist() == [teacher.tokenizer.convert_tokens_to_ids(["a", "bc", "a"])]
    assert rows.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("kind", [*sample_bpe.KINDS, "sentencepiece"])
def test_texts_come_back_in_the_teachers_tokens(kind, tmp_path):
    """With merges and cuts as models have them; what the student's begin with is as folded."""
    teacher, student = shrunk(kind, tmp_path)
    folded = fold(student, teacher)
    rejoin = Rejoin(folded, student, teacher)
    lines, same, first = samples.corpus_lines(random.Random(5), 200), 0, []
    for line in lines:
        mine, theirs = student.tokenize(line), teacher.tokenize(line)
        read, rows = (each[0] for each in rejoin.read(np.array([mine])))
        same += read[: len(theirs)].tolist() == theirs
        pairs = zip(rows[:-1], mine[1:], strict=True)
        first += [folded.student_of_teacher[read[row + 1]] == token for row, token in pairs if row >= 0]
    assert len(first) < 0.95 * sum(len(student.tokenize(line)) for line in lines)
    assert same >= 0.9 * len(lines) and np.mean(first) > 0.999


def shrunk(kind: str, folder) -> tuple[Tokenizer, Tokenizer]:
    """A sample of some 900 pieces, and a compact one."""
    if kind == "sentencepiece":
        data = samples.trained()
        (folder / "full").write_bytes(data)
        full = SentencePieceModel(data)
    else:
        full = HuggingFaceModel(HuggingFaceFolder.read(sample_bpe.folder(kind, folder / "full")))
    texts = [line.encode() for line in samples.corpus_lines(random.Random(8), 300)]
    counts = np.zeros((1, full.encoder.vocab_size), dtype=np.int64)
    full.encoder.add_histogram(texts, counts[0])
    full.compressed(full.choose(full.vocabulary(counts[0]), counts, 420), counts).write(
        str(folder / "compact")
    )
    if kind == "sentencepiece":
        return SentencePieceTokenizer(folder / "full"), SentencePieceTokenizer(folder / "compact.model")
    return tuple(HuggingFaceTokenizer(folder / name, use_fast=True) for name in ("full", "compact_hf"))


def ends(ids, sizes) -> list[int]:
    """Where in a text its tokens end, in bytes."""
    return list(itertools.accumulate(sizes[i] for i in ids))


def test_special_tokens_that_are_gone_begin_nothing(tmp_path):
    teacher, student = tokenizers_of("byte-level", tmp_path)
    folded = fold(student, teacher)
    unused = teacher.tokenizer.convert_tokens_to_ids("<unused>")
    assert np.flatnonzero(folded.student_of_teacher < 0).tolist() == [unused]
    assert folded.columns(teacher.vocab_size + 3)[-4:].tolist() == [-1] * 4
    each = np.full(teacher.vocab_size, 0.5 / (teacher.vocab_size - 1))
    each[unused] = 0.5
    assert folded.fold(each).sum() == pytest.approx(1)


def test_equal_tokenizers_need_no_fold_and_others_are_refused(tmp_path):
    teacher, student = tokenizers_of("sentencepiece", tmp_path)
    other = SentencePieceModel(teacher.processor.serialized_model_proto())
    other.write(str(tmp_path / "same"))
    assert fold(teacher, teacher) is None
    assert fold(HuggingFaceTokenizer(tmp_path / "same_hf", use_fast=True), teacher) is None
    with pytest.raises(FoldError, match="3 of the student's 2[0-9]+ pieces are not .* such as 'abc'"):
        fold(teacher, student)
    with pytest.raises(FoldError, match="NullTokenizer has no pieces"):
        fold(student, NullTokenizer(10))
