"""Compressed vocabularies: exact size, nothing dead, exact round trip, and the files of the tool."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.indexed import write_index
from megatron_ext.data.text.sources import find_sources
from megatron_ext.tokenizer import compress, compress_sentencepiece, encoder
from megatron_ext.tokenizer.compress_sentencepiece import SentencePieceModel
from megatron_ext.tokenizer.counts import Counts, count_dataset, count_text
from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.idmap import IdMap
from tests.unit.tokenizer import sample_models as samples

TOOL = Path(__file__).parents[3] / "tools" / "compress_tokenizer.py"
pytestmark = pytest.mark.skipif(encoder._encoder is None, reason="megatron_ext._encoder is not built")


@pytest.fixture(scope="module")
def model() -> bytes:
    return samples.trained()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two files of JSON lines, one compressed, with two sources."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = samples.corpus_lines(random.Random(8), 900)
    records = [{"text": text, "source": f"s{i % 2}/x"} for i, text in enumerate(lines)]
    dump = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / "one.jsonl").write_text("".join(dump[:600]), encoding="utf-8")
    with gzip.open(folder / "two.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(dump[600:])
    return folder


def counted(model: bytes, corpus: Path, workers: int = 1) -> Counts:
    return count_text(find_sources([str(corpus)]), NativeEncoder(model_proto=model), "sha", workers)[0]


def vocabulary_of(model: bytes, counts: Counts, drop_fillers: bool = False) -> compress.Vocabulary:
    proto = compress_sentencepiece.read_proto(model)
    return compress_sentencepiece.describe(
        proto, NativeEncoder(model_proto=model), drop_fillers, counts.total
    )


def shrunk(model: bytes, kept: np.ndarray) -> NativeEncoder:
    proto = compress_sentencepiece.pruned_model(compress_sentencepiece.read_proto(model), kept)
    return NativeEncoder(model_proto=proto.SerializeToString())


def unreachable(encoder: NativeEncoder) -> list[str]:
    return SentencePieceModel(encoder.processor.serialized_model_proto()).unreachable()


def test_counts_are_those_of_the_text(model, corpus):
    texts = samples.corpus_lines(random.Random(8), 900)
    one, two = counted(model, corpus), counted(model, corpus, workers=2)
    processor = NativeEncoder(model_proto=model).processor
    expected = np.bincount(sum(processor.encode(texts), []), minlength=len(processor))
    assert np.array_equal(one.total, expected)
    assert one.groups == two.groups == ["one/s0", "one/s1", "two/s0", "two/s1"]
    assert np.array_equal(one.counts, two.counts)
    assert one.text_bytes.sum() == sum(len(text.encode()) for text in texts)
    assert one.documents.tolist() == [300, 300, 150, 150]


def test_counts_are_saved_and_merged(model, corpus, tmp_path):
    counts = counted(model, corpus)
    counts.save(tmp_path / "c.npz")
    merged = Counts.load(tmp_path / "c.npz")
    merged.merge(counts)
    assert np.array_equal(merged.counts, 2 * counts.counts)
    with pytest.raises(ValueError, match="another tokenizer"):
        merged.merge(Counts.empty("other", counts.counts.shape[1]))
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="not a file of token counts"):
        Counts.load(tmp_path / "bad.npz")


def test_counts_of_a_dataset(model, corpus, tmp_path):
    native = NativeEncoder(model_proto=model)
    texts = samples.corpus_lines(random.Random(8), 900)
    flat, sizes = native.encode_batch_into(texts)
    (tmp_path / "d.bin").write_bytes(flat.tobytes())
    with open(tmp_path / "d.idx", "wb") as file:
        write_index(file, flat.dtype, sizes, np.arange(len(sizes) + 1))
    counts = count_dataset(str(tmp_path / "d"), SentencePieceModel(model).token_bytes(), "sha")
    assert np.array_equal(counts.total, counted(model, corpus).total)


@pytest.mark.parametrize("size", [880, 700, 500, 420])
def test_exact_size_nothing_dead_exact_round_trip(model, corpus, size):
    counts = counted(model, corpus)
    vocabulary = vocabulary_of(model, counts)
    kept = compress.choose(vocabulary, counts.counts, size)
    new = shrunk(model, kept)
    assert new.vocab_size == size == len(kept)
    assert unreachable(new) == []
    assert set(np.flatnonzero(vocabulary.fixed)) <= set(kept.tolist())
    for text in [*samples.corpus_lines(random.Random(9), 200), "новое слово 🙂\n\tx", "的 一是"]:
        assert new.processor.decode(new.encode(text).tolist()) == text


def test_shorter_than_pruning_by_counts(model, corpus):
    counts = counted(model, corpus)
    vocabulary = vocabulary_of(model, counts)
    kept = compress.choose(vocabulary, counts.counts, 500)
    fixed = np.flatnonzero(vocabulary.fixed)
    normal = np.flatnonzero(~vocabulary.fixed)
    frequent = normal[np.argsort(-counts.total[normal], kind="stable")][: 500 - len(fixed)]
    naive = shrunk(model, np.sort(np.concatenate([fixed, frequent])))
    texts = samples.corpus_lines(random.Random(8), 900)
    assert unreachable(naive) != []
    assert shrunk(model, kept).count(texts).sum() < naive.count(texts).sum()


def test_estimated_length_is_that_of_the_new_encoding(model, corpus):
    """What the removals are said to cost is what they do cost, to a percent."""
    counts = counted(model, corpus)
    vocabulary = vocabulary_of(model, counts)
    kept = set(compress.choose(vocabulary, counts.counts, 600).tolist())
    added = sum(
        growth.sum() for i, growth in compress.removal_order(vocabulary, counts.counts) if i not in kept
    )
    measured = shrunk(model, np.array(sorted(kept))).count(samples.corpus_lines(random.Random(8), 900)).sum()
    assert abs(measured / (counts.total.sum() + added) - 1) < 0.01


def test_fillers_go_only_if_asked(model, corpus):
    counts = counted(model, corpus)
    fillers = [i for i, t in enumerate(vocabulary_of(model, counts).texts) if t.startswith("<UNUSED_")]
    separator = vocabulary_of(model, counts).texts.index("<sep>")
    for drop in (False, True):
        kept = set(compress.choose(vocabulary_of(model, counts, drop), counts.counts, 500).tolist())
        assert len(kept) == 500 and separator in kept
        assert kept.isdisjoint(fillers) if drop else kept.issuperset(fillers)


def test_impossible_sizes_are_refused(model, corpus):
    counts = counted(model, corpus)
    vocabulary = vocabulary_of(model, counts)
    with pytest.raises(compress.CompressionError, match="must stay"):
        compress.choose(vocabulary, counts.counts, 100)
    with pytest.raises(compress.CompressionError, match="fewer than the"):
        compress.choose(vocabulary, counts.counts, 10**6)


def test_unigram(corpus):
    model = samples.trained("unigram", vocab_size=450)
    proto = compress_sentencepiece.read_proto(model)
    counts = counted(model, corpus)
    vocabulary = vocabulary_of(model, counts)
    kept = compress_sentencepiece.choose_unigram(vocabulary, counts.counts, 420)
    scores = compress_sentencepiece.unigram_scores(proto, counts.counts, kept)
    new = compress_sentencepiece.pruned_model(proto, kept, scores)
    assert len(new.pieces) == 420
    normal = [piece.score for piece in new.pieces if piece.type == samples.NORMAL]
    assert np.exp(normal).sum() == pytest.approx(1, abs=1e-4)
    small = NativeEncoder(model_proto=new.SerializeToString())
    for text in samples.corpus_lines(random.Random(9), 50):
        assert small.processor.decode(small.encode(text).tolist()) == text


@pytest.mark.parametrize("name", ["map.npz", "map.json"])
def test_id_map(tmp_path, name):
    ids = IdMap.of_kept(np.array([0, 2, 5]), 7, "a", "b")
    ids.save(tmp_path / name)
    read = IdMap.load(tmp_path / name)
    assert read.new_id.tolist() == [0, -1, 1, -1, -1, 2, -1]
    assert (read.new_size, read.old_sha256, read.new_sha256) == (3, "a", "b")
    assert read.old_id.tolist() == [0, 2, 5]
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match="not a map of ids"):
        IdMap.load(tmp_path / name)


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def test_tool(model, corpus, tmp_path):
    (tmp_path / "full.model").write_bytes(model)
    common = ("--tokenizer-model", tmp_path / "full.model", "--output", tmp_path / "out" / "small")
    done = run_tool(
        *common, "--input", corpus / "one.jsonl", corpus / "two.jsonl.gz",
        "--workers", 2, "--vocab-size", 500,
        "--validation", corpus / "one.jsonl", "--report", tmp_path / "report", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["new_size"] == 500 and summary["unreachable_after"] == 0
    assert 0 < summary["measured"]["more_tokens"] < 0.5
    native = NativeEncoder(tmp_path / "out" / "small.model")
    old = NativeEncoder(tmp_path / "full.model")
    ids = IdMap.load(tmp_path / "out" / "small.idmap.npz")
    for new_id, old_id in enumerate(ids.old_id.tolist()):
        assert native.processor.id_to_piece(new_id) == old.processor.id_to_piece(old_id)
    assert len((tmp_path / "out" / "small.vocab").read_text(encoding="utf-8").splitlines()) >= 500
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert all(row["round_trip_failures"] == 0 for row in report["held_out"].values())
    assert summary["recommended"] == report["recommended"]
    assert "| 500 |" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    check_hugging_face(tmp_path / "out" / "small_hf", native)
    wrong = run_tool(*common, "--counts", tmp_path / "full.model", "--vocab-size", 500)
    assert wrong.returncode == 1 and "not a file of token counts" in wrong.stderr
    usage = run_tool(*common, "--report", "x", "--workers", 0, "--model-preset", "none")
    assert usage.returncode == 2
    for flag in ("nothing to count", "--workers", "--report needs --vocab-size", "--model-preset none"):
        assert flag in usage.stderr
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": 1}\n')
    bad = run_tool(*common, "--input", tmp_path / "bad.jsonl")
    assert bad.returncode == 1 and "bad.jsonl: line 2" in bad.stderr


def test_tool_without_a_description_for_transformers(corpus, tmp_path):
    """A model whose normalizer tokenizer.json cannot say: no folder, and the reason."""
    (tmp_path / "full.model").write_bytes(samples.trained(normalization_rule_name="nmt_nfkc"))
    words = ("--tokenizer-model", tmp_path / "full.model", "--output", tmp_path / "small", "--json")
    words += ("--input", corpus / "one.jsonl", "--vocab-size", 500)
    done = run_tool(*words)
    assert done.returncode == 0, done.stderr
    assert "nmt_nfkc" in json.loads(done.stdout)["no_hf_folder"] and "WARNING" in done.stderr
    assert (tmp_path / "small.model").exists() and not (tmp_path / "small_hf").exists()
    (tmp_path / "small_hf").mkdir()
    again = run_tool(*words)
    assert again.returncode == 1 and "small_hf is of another model" in again.stderr


def test_benchmark_beside_a_newly_trained_model(model, corpus, tmp_path):
    (tmp_path / "full.model").write_bytes(model)
    benchmark = Path(__file__).parents[3] / "benchmarks" / "compress.py"
    words = ["--tokenizer-model", tmp_path / "full.model", "--input", corpus, "--work", tmp_path / "work"]
    more = ["--validation", corpus / "one.jsonl", "--sizes", 500, "--json"]
    done = subprocess.run(
        [sys.executable, str(benchmark), *map(str, [*words, *more])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    full, frequent, leaves, trained = json.loads(done.stdout)["rows"]
    assert [row["pieces"] for row in (frequent, leaves, trained)] == [500] * 3
    assert leaves["unreachable"] == trained["unreachable"] == 0 < frequent["unreachable"]
    assert full["training"] < leaves["training"] < frequent["training"]


def check_hugging_face(folder: Path, native: NativeEncoder) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in samples.corpus_lines(random.Random(10), 100):
        ids = native.encode(text).tolist()
        assert fast.encode(text, add_special_tokens=False).ids == ids
        assert fast.decode(ids) == text


def test_internlm_to_48000(shared):
    """The training corpus: exactly 48,000 pieces, none dead, at most 1.4 % more tokens, exact round trip."""
    data = shared / "data"
    model = (data / "tokenizers" / "internlm-103168.model").read_bytes()
    inputs = [str(path) for path in sorted((data / "corpus").glob("train_*.jsonl.gz"))]
    counts, _ = count_text(find_sources(inputs), NativeEncoder(model_proto=model), "", workers=2)
    new = shrunk(model, compress.choose(vocabulary_of(model, counts), counts.counts, 48_000))
    assert new.vocab_size == 48_000
    assert unreachable(new) == []
    assert count_text(find_sources(inputs), new, "", workers=2)[0].total.sum() <= 1.014 * counts.total.sum()
    for path in (data / "corpus").glob("valid_*.jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                assert new.processor.decode(new.encode(text).tolist()) == text
