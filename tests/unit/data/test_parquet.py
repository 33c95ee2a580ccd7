"""Parquet is read as JSON lines are: the same documents and bytes; errors name row group and row."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.data.text import parquet
from megatron_ext.data.text.chunks import Chunk, chunks, place_name, units
from megatron_ext.data.text.documents import BadDocument, Documents
from megatron_ext.data.text.parquet import RowGroup, RowRange
from megatron_ext.data.text.sources import SourceError, find_sources
from megatron_ext.preprocess import run as running
from megatron_ext.preprocess.options import PreprocessError
from tests.unit.data import corpora
from tests.unit.data.test_inputs import change
from tests.unit.data.test_reader import READERS, by_counts, by_preprocess
from tests.unit.preprocess.test_preprocess import command, kill_after_parts, run

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return corpora.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """So that small files have many batches, and chunks; forked workers inherit it."""
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1000)


def write(path: Path, texts: list, kind=None, more: dict | None = None, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"row_group_size": 50, "write_page_checksum": True} | how
    pq.write_table(pa.table({"text": pa.array(texts, kind), **(more or {})}), path, **how)
    return path


def texts_of(source: Path, chunk_bytes: int = 1500) -> list[str]:
    """All documents of a file, in order, as the workers read them."""
    found = []
    for chunk in chunks(find_sources([str(source)], keys=["text"]), chunk_bytes):
        found += [document.texts[0][0].decode() for document in Documents(chunk, ["text"])]
    return found


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("row_group_size", [1, 7, 50, 1000])
def test_same_bytes_as_json_lines(model, tmp_path, workers, row_group_size):
    texts = corpora.documents(120)
    expected = corpora.upstream(tmp_path / "upstream", texts, model)
    source = write(tmp_path / "in.parquet", texts, row_group_size=row_group_size)
    summary = run(model, source, tmp_path / "out", workers=workers)
    assert corpora.hashes(tmp_path / "out_text_document") == expected
    [manifest] = summary["datasets"].values()
    assert manifest["lines"]["read"] == manifest["documents"] == 120
    assert manifest["lines"]["text_bytes"] == len("".join(texts).encode())
    assert manifest["inputs"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.parametrize("chunk_bytes", [1, 1500, 5000, 10**6])
def test_every_row_is_in_one_chunk(tmp_path, chunk_bytes):
    """Whatever the row groups and chunks are, also when chunks are read in any order, and by shards."""
    texts = corpora.documents(300)
    source = write(tmp_path / "in.parquet", texts, row_group_size=110)
    sources = find_sources([str(source)], keys=["text"])
    cut = list(chunks(sources, chunk_bytes))
    assert sum(chunk.size for chunk in cut) == source.stat().st_size
    assert len(cut) > 3 or chunk_bytes > 10**5
    read = {}
    for chunk in random.Random(0).sample(cut, len(cut)):
        read[chunk.number] = [document.raw.decode() for document in Documents(chunk, ["text"])]
    assert sum((read[number] for number in sorted(read)), []) == texts
    shards = [units(sources, chunk_bytes, (i, 3)) for i in range(3)]
    assert sum(shards, []) == units(sources, chunk_bytes, None)


def test_places():
    groups = [RowGroup(10, 100), RowGroup(0, 1), RowGroup(400, 4000), RowGroup(900, 9000), RowGroup(4, 40)]
    expected = [
        (RowRange(0, 0, 10), RowRange(2, 0, 400)),
        (RowRange(3, 0, 400),),
        (RowRange(3, 400, 800),),
        (RowRange(3, 800, 900),),
        (RowRange(4, 0, 4),),
    ]
    assert parquet.cut(groups, 1000) == expected
    chunk = Chunk(0, 0, "in.parquet", rows=expected[0])
    assert place_name(chunk, 10) == "row group 0, row 9"
    assert place_name(chunk, 10, 12) == "row group 0, row 9 to row group 2, row 1"


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]
)
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
def test_ways_to_store_text(tmp_path, kind, compression):
    texts = corpora.documents(90)
    column = pa.array(texts).cast(getattr(pa, kind)())
    source = write(tmp_path / "in.parquet", column, compression=compression, data_page_size=500)
    assert texts_of(source) == texts


@pytest.mark.parametrize("kind", ["string", "large_string", "binary"])
def test_dictionaries(tmp_path, kind):
    texts = corpora.documents(12) * 10
    column = pa.array(texts).cast(getattr(pa, kind)()).dictionary_encode()
    assert texts_of(write(tmp_path / "in.parquet", column)) == texts


def test_an_extension_type_is_what_it_is_stored_as(tmp_path):
    texts = ['{"a": 1}', '"x"']
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts))
    assert texts_of(write(tmp_path / "in.parquet", column)) == texts


@pytest.mark.parametrize("name", [b"caf\xe9.parquet", b"with space %20 # 2.parquet", b"s3:x.parquet"])
def test_names_of_files(model, tmp_path, name):
    """Also those that are no UTF-8 or look like an address."""
    source = write(tmp_path / "in.parquet", ["a"] * 5).rename(tmp_path / os.fsdecode(name))
    [manifest] = run(model, source, tmp_path / "out")["datasets"].values()
    assert manifest["documents"] == 5
    assert json.loads((tmp_path / "out_text_document.json").read_bytes())["inputs"][0]["name"] == str(source)


@pytest.mark.parametrize("reader", READERS)
def test_all_tools_read_it(model, tmp_path, reader):
    texts = [text for text in corpora.documents(80) if text]
    lines = corpora.write_jsonl(tmp_path / "lines.jsonl", texts)
    assert reader(write(tmp_path / "in.parquet", texts), model) == reader(lines, model)


@pytest.mark.parametrize("reader", READERS)
def test_rows_that_cannot_be_used(model, tmp_path, reader):
    """Null and bytes that are no UTF-8 are bad lines, named by row group and row."""
    good = [text.encode() for text in corpora.documents(120) if text]
    expected = reader(write(tmp_path / "good.parquet", good), model)
    for value, reason in [
        (None, "the value of 'text' is null, not text"),
        (b"a \xff", "the value of 'text' is not UTF-8: byte 0xff at 2 (invalid start byte)"),
    ]:
        source = write(tmp_path / "bad.parquet", [*good[:60], value, *good[60:], value])
        with pytest.raises(ValueError) as error:
            reader(source, model)
        assert str(error.value).startswith(f"{source}: row group 1, row 10: {reason}. Nothing was written")
        assert "leave such rows out with --on-bad-line skip" in str(error.value)
        assert reader(source, model, "skip") == expected


def test_quarantine_names_row_group_and_row(model, tmp_path):
    texts = [b"good"] * 70 + [None, b"\xfe\xff"] + [b"good"] * 5
    lines = corpora.write_jsonl(tmp_path / "b.jsonl", ["good"] * 3)
    lines.write_bytes(lines.read_bytes() + b"broken\n")
    summary = run(
        model, [write(tmp_path / "a.parquet", texts), lines], tmp_path / "out", on_bad_line="quarantine"
    )
    [manifest] = summary["datasets"].values()
    assert (manifest["documents"], manifest["lines"]["dropped"], manifest["lines"]["read"]) == (78, 3, 81)
    notes = [json.loads(note) for note in (tmp_path / "out_bad_lines.jsonl").read_text().splitlines()]
    reasons = [note.pop("reason") for note in notes]
    assert "null" in reasons[0] and "not UTF-8" in reasons[1] and "not JSON" in reasons[2]
    assert notes == [
        {"file": str(tmp_path / "a.parquet"), "row_group": 1, "row": 20},
        {"file": str(tmp_path / "a.parquet"), "row_group": 1, "row": 21, "content_base64": "/v8="},
        {"file": str(lines), "line": 4, "content": "broken"},
    ]


def test_several_keys_folders_globs_and_mixed_inputs(model, tmp_path):
    """As a clone from the Hugging Face hub has them, beside JSON lines."""
    texts, titles = corpora.documents(90), [f"title {i}" for i in range(90)]
    for i in range(2):
        mine = slice(30 * i, 30 * i + 30)
        more = {"title": titles[mine], "nested": [{"a": [1]}] * 30}
        write(tmp_path / "in" / "data" / f"train-0000{i}-of-00002.parquet", texts[mine], more=more)
    write(tmp_path / "in" / ".cache" / "x.parquet", ["left out"])
    (tmp_path / "in" / "dataset_infos.json").write_text('{\n "default": {}\n}\n')
    (tmp_path / "in" / "README.md").write_text("# A dataset")
    corpora.write_jsonl(tmp_path / "in" / "z.jsonl.gz", texts[60:], title=lambda i: titles[60 + i])
    expected = [
        corpora.upstream(tmp_path / "up_text", texts, model),
        corpora.upstream(tmp_path / "up_title", titles, model),
    ]
    glob = tmp_path / "in" / "data" / "train-*.parquet"
    for name, words in {"folder": [tmp_path / "in"], "glob": [glob, tmp_path / "in" / "z.jsonl.gz"]}.items():
        run(model, words, tmp_path / name, json_keys=["text", "title"])
        keys = ("text", "title")
        assert [corpora.hashes(tmp_path / f"{name}_{key}_document") for key in keys] == expected


@pytest.mark.parametrize("kind", ["string", "int64", "dictionary"])
def test_groups_of_counts_are_those_of_json_lines(tmp_path, kind):
    texts, sources = ["some text"] * 60, [f"{i % 3}" for i in range(60)]
    column = pa.array(sources)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    source = write(tmp_path / "in.parquet", texts, more={"source": column})
    [chunk] = chunks(find_sources([str(source)], keys=["text"]), 10**6)
    assert [document.source for document in Documents(chunk, ["text"])] == sources


def test_shards_merge_into_the_whole(model, tmp_path):
    texts = corpora.documents(200)
    inputs = [
        write(tmp_path / "a.parquet", texts[:120], row_group_size=1000),
        corpora.write_jsonl(tmp_path / "b.jsonl", texts[120:]),
    ]
    run(model, inputs, tmp_path / "whole")
    data = b""
    for i in range(3):
        summary = run(model, inputs, tmp_path / "part", shard=(i, 3))
        assert summary["datasets"], i
        data += (tmp_path / f"part_0000{i}-of-00003_text_document.bin").read_bytes()
    assert data == (tmp_path / "whole_text_document.bin").read_bytes()


def test_killed_at_any_moment_it_goes_on(model, tmp_path):
    """kill -9 at random, with 1, 2, then 3 workers: the bytes of JSON lines of the same documents."""
    texts = corpora.documents(12000)
    lines = corpora.write_jsonl(tmp_path / "in.jsonl", texts)
    source = write(tmp_path / "in.parquet", texts, row_group_size=9000)
    words = command(model, source, tmp_path / "out", "--json")
    for workers, target in ((1, 1), (2, 2)):
        kill_after_parts([*words, "--workers", str(workers)], tmp_path / "out", target)
    words += ["--workers", "3"]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["parts_reused"] >= 2
    run(model, lines, tmp_path / "lines", chunk_bytes=None)
    assert corpora.hashes(tmp_path / "out_text_document") == corpora.hashes(tmp_path / "lines_text_document")
    assert not (tmp_path / "out_preprocess_work").exists()


def damaged(source: Path) -> int:
    """Overwrite the middle of the data; how many rows are read in front of it."""
    data = bytearray(source.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    source.write_bytes(data)
    [chunk] = chunks(find_sources([str(source)], keys=["text"]), 10**9)
    return next(d.place for d in Documents(chunk, ["text"]) if isinstance(d, BadDocument)) - 1


@pytest.mark.parametrize("how", ["zstd", "none"])
def test_damaged_data(model, tmp_path, how):
    """All rows that cannot be read are named and counted, the same for any number of workers."""
    texts = corpora.documents(400)
    pages = {"data_page_size": 2000, "write_batch_size": 10, "use_dictionary": False, "compression": how}
    source = write(tmp_path / "in.parquet", texts, row_group_size=300, **pages)
    readable = damaged(source)
    assert 20 < readable < 300
    with pytest.raises(PreprocessError) as error:
        run(model, source, tmp_path / "out", workers=2)
    named = f"{source}: row group 0, row {readable}: the parquet data is damaged: "
    assert str(error.value).startswith(named) and not list(tmp_path.glob("out*"))
    expected = corpora.upstream(tmp_path / "upstream", texts[:readable] + texts[300:], model)
    for workers in (1, 3):
        for left in tmp_path.glob("out*"):
            left.unlink()
        summary = run(model, source, tmp_path / "out", workers=workers, on_bad_line="skip")
        assert corpora.hashes(tmp_path / "out_text_document") == expected
        [manifest] = summary["datasets"].values()
        assert (manifest["lines"]["read"], manifest["lines"]["dropped"]) == (400, 300 - readable)
        notes = [json.loads(note) for note in (tmp_path / "out_bad_lines.jsonl").read_text().splitlines()]
        assert [note["row"] for note in notes] == list(range(readable, 300))


def other_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be read at all, and what is said of them."""
    whole = write(folder / "whole.parquet", corpora.documents(200)).read_bytes()
    made = {
        "truncated": (whole[: len(whole) // 2], "is damaged, cut off or of an unknown kind of parquet: "),
        "a magic": (b"PAR1", "is damaged, cut off or"),
        "no footer": (whole[:-9] + bytes(9), "is damaged, cut off or"),
        "empty": (b"", "is damaged, cut off or"),
        "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is damaged, cut off or"),
        "an archive": (__import__("gzip").compress(whole), "is damaged, cut off or"),
    }
    # The column of optional values says that they are required: its histogram has one level too many.
    optional, required = (bytes([0x15, 0x0C, 0x25, need, 0x18, 4]) + b"text" for need in (2, 0))
    assert whole.count(optional) == 1
    made["a histogram"] = whole.replace(optional, required), "is damaged: reading its footer ends the process"
    found = {}
    for name, (data, said) in made.items():
        found[name] = (folder / f"{name}.parquet", said)
        found[name][0].write_bytes(data)
    column = pa.array(["x"] * 3)
    tables = {
        "without": (
            pa.table({"body": column, "id": [1, 2, 3]}),
            "has no column 'text' (columns: 'body', 'id')",
        ),
        "without any": (pa.table({}), "has no column 'text' (columns: none)"),
        "list": (pa.table({"text": [["x"]]}), "the column 'text' is nested, list<"),
        "struct": (pa.table({"text": [{"a": "x"}]}), "the column 'text' is nested, struct<"),
        "numbers": (pa.table({"text": [1.5]}), "the column 'text' is double, not text"),
        "twice": (pa.table([column, column], ["text", "text"]), "has 2 columns 'text'"),
    }
    for name, (table, said) in tables.items():
        found[name] = (folder / f"{name}.parquet", said)
        pq.write_table(table, found[name][0])
    return found


def test_files_that_cannot_be_read(model, tmp_path):
    """Before anything is written, also where bad lines are left out."""
    good = write(tmp_path / "good" / "a.parquet", ["good"] * 10)
    for name, (source, said) in other_files(tmp_path / "in").items():
        for how in ("stop", "skip"):
            with pytest.raises(SourceError) as error:
                run(model, [good, source], tmp_path / "out", on_bad_line=how)
            assert str(error.value).startswith(f"--input {source}: {said}"), name
            assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))
    packed = tmp_path / "in.gz"
    packed.write_bytes(__import__("gzip").compress(good.read_bytes()))
    with pytest.raises(SourceError, match=r"in.gz: is parquet in an archive or a pipe"):
        run(model, packed, tmp_path / "out")


@pytest.mark.parametrize("reader", READERS)
def test_files_without_rows(model, tmp_path, reader):
    source = write(tmp_path / "in.parquet", [], pa.string())
    for how in ("stop", "skip"):
        with pytest.raises(ValueError, match=r"in.parquet: holds no documents"):
            reader(source, model, how)


def test_an_empty_shard_among_others_is_no_fault(model, tmp_path, capsys):
    """An empty file of lines is: it may be a download that failed."""
    texts = corpora.documents(20)
    sources = [write(tmp_path / "a.parquet", [], pa.string()), write(tmp_path / "b.parquet", texts)]
    summary = run(model, sources, tmp_path / "out")
    assert corpora.hashes(tmp_path / "out_text_document") == corpora.upstream(
        tmp_path / "upstream", texts, model
    )
    [manifest] = summary["datasets"].values()
    assert manifest["lines"]["dropped"] == 0 and manifest["bad_lines_file"] is None
    assert f"WARNING: parquet files without rows: {sources[0]}\n" in capsys.readouterr().err
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(PreprocessError, match="c.jsonl: holds no documents.* or give --on-bad-line skip"):
        run(model, [*sources, tmp_path / "c.jsonl"], tmp_path / "other")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    source = write(tmp_path / "in.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        SourceError, match=r"in.parquet: parquet files need pyarrow, of the extra \[data\]: pip"
    ):
        find_sources([str(source)])


@pytest.mark.parametrize("how", ["truncated", "dated back", "replaced", "removed"])
@pytest.mark.parametrize("moment", ["_done", "_inputs"])
def test_a_file_that_changes_makes_no_dataset(model, tmp_path, monkeypatch, how, moment):
    source = write(tmp_path / "in.parquet", corpora.documents(120))
    method = getattr(running._Run, moment)

    def changing(self, *args, **kwargs):
        if not getattr(self, "changed", False):
            self.changed = True
            change(how, source)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(running._Run, moment, changing)
    with pytest.raises(ValueError, match=r"in.parquet: was written to, repl"):
        run(model, source, tmp_path / "out", on_bad_line="skip")
    assert not list(tmp_path.glob("out_text*"))


def test_parts_of_other_rows_with_the_same_date_are_not_taken(model, tmp_path, monkeypatch):
    """A run that was killed; then other texts of the same size are written there, and dated back."""
    how = {"compression": "none", "use_dictionary": False, "write_page_checksum": False}
    source = write(tmp_path / "in.parquet", ["the cat and the data"] * 120, **how)
    with monkeypatch.context() as patched:
        patched.setattr(running._Run, "_assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, source, tmp_path / "out")
    state = source.stat()
    source.write_bytes(source.read_bytes().replace(b"the cat and", b"the dog and"))
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(PreprocessError, match=r"in.parquet: was written to"):
        run(model, source, tmp_path / "out")
    assert run(model, source, tmp_path / "out")["parts_reused"] == 0


def test_readers_of_a_process_do_not_disturb_each_other(model, tmp_path):
    """Reading here before workers are forked, and again after."""
    source = write(tmp_path / "in.parquet", corpora.documents(300), row_group_size=1000)
    lines = corpora.write_jsonl(tmp_path / "lines.jsonl", corpora.documents(300))
    expected = by_counts(lines, model)
    for _ in range(2):
        assert len(texts_of(source)) == 300
        assert by_counts(source, model) == expected == by_preprocess(source, model)
        (tmp_path / "in_stop_text_document.json").unlink()
