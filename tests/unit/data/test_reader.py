"""One reader of JSON lines: a line means the same to every tool that takes text."""

import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_ext.data.indexed import check_layout
from megatron_ext.data.text.records import BadLine, load_record
from megatron_ext.data.text.sources import SourceError, find_sources
from megatron_ext.preprocess.options import Options
from megatron_ext.preprocess.run import preprocess
from megatron_ext.tokenizer.counts import count_text
from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.train import train_tokenizer
from tests.unit.data import corpora
from tests.unit.preprocess.test_preprocess import BAD_LINES, packed
from tools import compress_tokenizer

TOOLS = Path(__file__).resolve().parents[3] / "tools"
MARK = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return corpora.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def by_preprocess(source: Path, model: Path, how: str = "stop") -> tuple[int, int]:
    """(documents, ids) of the dataset."""
    prefix = str(source.with_suffix("")) + f"_{how}"
    preprocess(Options([str(source)], prefix, corpora.flags(model), on_bad_line=how), quiet=True)
    index = check_layout(f"{prefix}_text_document")
    return len(index.documents) - 1, index.num_tokens


def by_counts(source: Path, model: Path, how: str = "stop") -> tuple[int, int]:
    """(documents, ids) that compress_tokenizer.py counts."""
    counts, _ = count_text(find_sources([str(source)]), NativeEncoder(model), "", 1, on_bad_line=how)
    return int(counts.documents.sum()), int(counts.total.sum())


def by_training(source: Path, model: Path, how: str = "stop") -> tuple[int, int]:
    """(documents, bytes of text) that train_tokenizer.py learns from."""
    output, settings = source.with_suffix(".model"), {"key": "text", "sample_bytes": 10**9, "seed": 1}
    sample = train_tokenizer([str(source)], output, 300, on_bad_line=how, **settings)
    return sample.documents, sample.text_bytes


READERS = [by_preprocess, by_counts, by_training]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def spellings() -> dict[str, bytes]:
    """The same documents as Windows, editors and joined files have them."""
    lines = [json.dumps({"text": text}).encode() for text in corpora.documents(60) if text]
    plain = b"\n".join(lines) + b"\n"
    half = b"\n".join(lines[:30]) + b"\n"
    rest = plain.removeprefix(half)
    return {
        "plain": plain,
        "mark": MARK + plain,
        "CRLF": MARK + plain.replace(b"\n", b"\r\n"),
        "joined": MARK + half + MARK + rest,
        "blank lines": MARK + b"\r\n \n" + half + b"\n\t\n" + rest.rstrip(),
        "members": gzip.compress(MARK + half) + gzip.compress(MARK + rest),
    }


@pytest.mark.parametrize("reader", READERS)
def test_spellings_of_the_same_documents(model, tmp_path, reader):
    found = {
        name: reader(written(tmp_path / f"{i}.jsonl", data), model)
        for i, (name, data) in enumerate(spellings().items())
    }
    assert found["plain"][0] > 50 and found["plain"][1] > 1000
    assert set(found.values()) == {found["plain"]}, found


@pytest.mark.parametrize("reader", READERS)
def test_a_list_of_strings_is_one_document(model, tmp_path, reader):
    texts = [text for text in corpora.documents(40) if text]
    lists = [[text, "", "and another"] for text in texts]
    source = corpora.write_jsonl(tmp_path / "in.jsonl", texts, text=lambda i: lists[i])
    documents, size = reader(source, model)
    expected = NativeEncoder(model).count([text for parts in lists for text in parts]).sum()
    if reader is by_training:
        expected = sum(len("\n".join(parts).encode()) for parts in lists)
    assert (documents, size) == (len(texts), expected)


def test_a_key_twice_is_a_fault_where_it_is_the_one_that_is_read():
    """Not within a value or a text, nor another key."""
    for line in (
        b'{"text": "a", "meta": {"text": 1, "text": 2}}',
        b'{"text": "\\"text\\"", "b": ["text", "text"]}',
        b'{"text": "a", "id": 1, "id": 2}',
    ):
        assert load_record(line, ["text"])["text"][0] in 'a"'
    with pytest.raises(BadLine, match="the key 'b c' stands in it twice"):
        load_record(b'{"text": "a", "b c": 1, "b c": 10000000000000000000000}', ["text", "b c"])


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("reader", READERS)
def test_bad_lines(model, tmp_path, reader, kind):
    """The same words of the same line, in a file and in an archive; left out when asked."""
    line, reason = BAD_LINES[kind]
    good = [json.dumps({"text": text}).encode() for text in corpora.documents(50) if text]
    data = b"\n".join([*good[:30], line, *good[30:], line])
    expected = reader(written(tmp_path / "good.jsonl", b"\n".join(good)), model)
    for name, content in {"bad.jsonl": data, "bad.jsonl.gz": gzip.compress(data)}.items():
        source = written(tmp_path / name, content)
        with pytest.raises(ValueError) as error:
            reader(source, model)
        assert str(error.value).startswith(f"{source}: line 31: ") and reason in str(error.value)
        assert "--on-bad-line skip" in str(error.value)
        assert reader(source, model, "skip") == expected


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["gz", "xz", "bz2", "zst"])
def test_archives_in_parts_and_cut_off(model, tmp_path, reader, kind):
    texts = [text for text in corpora.documents(300) if text]
    text = corpora.write_jsonl(tmp_path / "plain.jsonl", texts).read_bytes()
    data = packed(kind, text)
    source = written(tmp_path / "in.jsonl", data)
    assert reader(source, model) == reader(tmp_path / "plain.jsonl", model)
    source.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(ValueError, match=r"in.jsonl: line \d+: .*data is damaged or cut off"):
        reader(source, model)
    assert 20 < reader(source, model, "skip")[0] < len(texts)


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("reader", READERS)
def test_utf_16_is_named(model, tmp_path, reader, pack, coding):
    """Also where bad lines are left out: nothing of the file would be read."""
    source = written(tmp_path / "in.jsonl", pack('{"text": "the cat"}\n'.encode(coding)))
    for how in ("stop", "skip"):
        with pytest.raises(SourceError, match=r"in.jsonl: is UTF-16 or UTF-32 text.*iconv"):
            reader(source, model, how)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("data", [b"", MARK, b"\n \n", gzip.compress(b"")])
def test_files_without_documents(model, tmp_path, reader, data):
    source = written(tmp_path / "in.jsonl", data)
    for how in ("stop", "skip"):
        with pytest.raises(ValueError, match=r"in.jsonl: holds no documents"):
            reader(source, model, how)


def test_a_packed_pipe_is_unpacked(model, tmp_path):
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(60))
    expected = by_preprocess(source, model)
    words = [
        sys.executable, str(TOOLS / "preprocess_data.py"), "--input", "-",
        "--output-prefix", str(tmp_path / "o"), "--workers", "1",
        "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(model),
    ]  # fmt: skip
    subprocess.run(words, input=gzip.compress(MARK + source.read_bytes()), check=True, capture_output=True)
    index = check_layout(tmp_path / "o_text_document")
    assert (len(index.documents) - 1, index.num_tokens) == expected


def test_a_pipe_is_not_read_twice(model, tmp_path, capsys):
    """It would be found empty the second time."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = ["--input", str(pipe), "--tokenizer-model", str(model), "--output", str(tmp_path / "o")]
    assert compress_tokenizer.main([*words, "--vocab-size", "380"]) == 1
    assert "pipe: the text is read twice, which a pipe does not allow" in capsys.readouterr().err
    with pytest.raises(SourceError, match="read twice"):
        by_training(pipe, model)
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(20))
    writer = threading.Thread(target=lambda: pipe.write_bytes(source.read_bytes()))
    writer.start()
    assert compress_tokenizer.main([*words, "--json"]) == 0  # only counted
    writer.join()
    assert json.loads(capsys.readouterr().out)["counted_tokens"] == by_counts(source, model)[1]
