"""tools/merge_datasets.py and tools/inspect_dataset.py: through their command lines."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from tests.unit.data import corpora

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def tool(name: str):
    """The module of a tool."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_merging_is_megatron_cores(tmp_path):
    """Byte for byte what IndexedDatasetBuilder.add_index makes of the same datasets."""
    folder = tmp_path / "in"
    folder.mkdir()
    prefixes = [
        corpora.make_dataset(folder / name, [3 * i + 2] * (i + 4), seed=i) for i, name in enumerate("abc")
    ]
    builder = IndexedDatasetBuilder(f"{tmp_path / 'theirs'}.bin", dtype=DType.optimal_dtype(200))
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(f"{tmp_path / 'theirs'}.idx")
    merge = tool("merge_datasets").main
    assert merge(["--input", str(folder), "--output-prefix", str(tmp_path / "ours")]) == 0
    assert corpora.hashes(tmp_path / "ours") == corpora.hashes(tmp_path / "theirs")


def test_documents_with_and_without_an_end_are_not_mixed(tmp_path, capsys):
    """One dataset with --append-eod and one without: some texts would run into the next."""
    prefixes = [str(corpora.make_dataset(tmp_path / name, [5, 6])) for name in "abc"]
    for prefix, ended in zip(prefixes, (True, True, False), strict=True):
        facts = {"format": "megatron_ext.dataset/1", "options": {"append_eod": ended}}
        Path(f"{prefix}.json").write_text(json.dumps(facts))
    merge, output = tool("merge_datasets").main, ["--output-prefix", str(tmp_path / "out")]
    assert merge(["--input", *prefixes[:2], *output]) == 0
    for other in (prefixes[0], str(tmp_path / "out")):  # the joined manifest says it on
        assert merge(["--input", other, prefixes[2], "--output-prefix", str(tmp_path / "mixed")]) == 1
        assert "c has --append-eod False" in capsys.readouterr().err


def test_a_dataset_beside_the_folder_of_its_indices(tmp_path):
    """Training keeps its index files in a folder of the dataset's name."""
    a, b = (corpora.make_dataset(tmp_path / name, [5, 6], seed=i) for i, name in enumerate("ab"))
    merge = tool("merge_datasets").main
    assert merge(["--input", str(a), str(b), "--output-prefix", str(tmp_path / "before")]) == 0
    (tmp_path / "a" / "cache" / "GPTDataset_indices").mkdir(parents=True)
    assert merge(["--input", str(a), str(b), "--output-prefix", str(tmp_path / "after")]) == 0
    assert corpora.hashes(tmp_path / "after") == corpora.hashes(tmp_path / "before")


@pytest.mark.parametrize("content", ['{"text": "a corpus"}\n', '{\n "format": "megatron_ext.round/1"}', ""])
def test_a_manifest_takes_no_other_files_place(tmp_path, capsys, content):
    """``--output-prefix data/my`` beside a corpus data/my.json, or beside the manifest of a round."""
    a = corpora.make_dataset(tmp_path / "a", [5, 6])
    other = tmp_path / "my.json"
    other.write_text(content)
    merge = ["--input", str(a), "--output-prefix", str(tmp_path / "my")]
    assert tool("merge_datasets").main(merge) == 1
    assert "my.json: is no manifest of megatron_ext.dataset/1" in capsys.readouterr().err
    assert other.read_text() == content and not list(tmp_path.glob("my.[bi]*"))
    other.unlink()
    assert tool("merge_datasets").main(merge) == tool("merge_datasets").main(merge) == 0


def test_what_cannot_be_merged(tmp_path, capsys):
    merge = tool("merge_datasets").main
    a = corpora.make_dataset(tmp_path / "a", [5, 6])
    corpora.make_dataset(tmp_path / "b", [5, 6], vocabulary=70000)
    output = ["--output-prefix", str(tmp_path / "out")]
    assert merge(["--input", str(a), str(tmp_path / "b"), *output]) == 1
    assert "int32" in capsys.readouterr().err
    assert merge(["--input", str(a), str(tmp_path / "none"), *output]) == 1
    assert "none.bin: there is no such file" in capsys.readouterr().err
    assert merge(["--input", str(a), "--output-prefix", str(a)]) == 1
    assert "is the input" in capsys.readouterr().err
    for prefix, sha256 in (("a", "1" * 64), ("c", "2" * 64)):
        corpora.make_dataset(tmp_path / prefix, [5, 6])
        facts = {"format": "megatron_ext.dataset/1", "tokenizer": {"sha256": sha256}}
        (tmp_path / f"{prefix}.json").write_text(json.dumps(facts))
    assert merge(["--input", str(a), str(tmp_path / "c"), *output]) == 1
    assert "the tokenizer" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_inspecting(tmp_path, capsys):
    inspect = tool("inspect_dataset").main
    lengths = [1, 2, 3, 4, 100]
    prefix = corpora.make_dataset(tmp_path / "a", lengths)
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "199"]
    assert inspect(["--input", str(prefix), "--verify", "--samples", "2", "--json", *null]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["documents"], found["tokens"]) == (5, 110)
    assert found["histogram"] == [
        [1, 2, 1],
        [2, 4, 2],
        [4, 8, 1],
        [8, 16, 0],
        [16, 32, 0],
        [32, 64, 0],
        [64, 128, 1],
    ]
    ids = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    assert (found["largest_id"], found["distinct_ids"]) == (ids.max(), len(set(ids.tolist())))
    assert found["samples"][0]["text"] == str(ids[0])
    assert inspect(["--input", str(prefix)]) == 0
    assert "documents  5" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_verification_finds_a_changed_byte(tmp_path, capsys, suffix):
    model = corpora.train_tokenizer(tmp_path)
    corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(30))
    words = [
        "--input",
        str(tmp_path / "in.jsonl"),
        "--output-prefix",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    assert tool("preprocess_data").main(words) == 0
    inspect = tool("inspect_dataset").main
    check = ["--input", str(tmp_path / "out_text_document"), "--verify"]
    assert inspect(check) == 0
    path = tmp_path / f"out_text_document.{suffix}"
    with open(path, "r+b") as file:
        file.seek(-9, os.SEEK_END)
        byte = file.read(1)
        file.seek(-9, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    assert inspect(check) == 1
    assert path.name in capsys.readouterr().err
