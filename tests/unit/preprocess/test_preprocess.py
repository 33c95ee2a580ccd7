"""tools/preprocess_data.py: the same bytes as upstream, always; clear errors; nothing half-written."""

import bz2
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.data.text import documents
from megatron_ext.data.text.chunks import chunks, lines_of
from megatron_ext.data.text.pool import WorkerFailed
from megatron_ext.data.text.sources import SourceError, find_sources
from megatron_ext.preprocess.options import Options, PreprocessError
from megatron_ext.preprocess.run import preprocess
from tests.unit.data import corpora

TOOL = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"
GOLDEN = {
    "internlm-103168": "a0ceb5ab47dd0acfff0b83612699ac4010e687be4bce114bff87b1aee565ac98 "
    "cf92c8bcda558ab2082d9063a982f456cb24066750ece474531f2abf268e5a29",
    "llama-32000": "bbf6b4ef02b8086c6ab911c761e79a1b48ba159ad0b0315f1906ea39c7a8df22 "
    "48d96825c5c81e65cfce7412066861c1df6c99168364f0e2cfc1f3844cd0da40",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return corpora.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(model: Path, inputs, prefix: Path, **changes) -> dict:
    inputs = [str(i) for i in (inputs if isinstance(inputs, list) else [inputs])]
    values = {"append_eod": True, "workers": 2, "chunk_bytes": 1500} | changes
    return preprocess(Options(inputs, str(prefix), corpora.flags(model), **values), quiet=True)


def left(folder: Path, name: str) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(name))


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_of_megatron_lm(shared, tmp_path, name):
    """The sha256 that Megatron-LM's own tool gave for the shared validation texts."""
    corpus = shared / "data" / "corpus"
    parts = [
        gzip.decompress((corpus / f"valid_{part}.jsonl.gz").read_bytes()) for part in ("en", "zh", "code")
    ]
    (tmp_path / "valid.jsonl").write_bytes(b"".join(parts))
    tokenizer = shared / "data" / "tokenizers" / f"{name}.model"
    run(tokenizer, tmp_path / "valid.jsonl", tmp_path / "plain", chunk_bytes=None)
    assert corpora.hashes(tmp_path / "plain_text_document") == GOLDEN[name]
    packed = [corpus / f"valid_{part}.jsonl.gz" for part in ("en", "zh", "code")]
    run(tokenizer, packed, tmp_path / "packed", workers=1, chunk_bytes=None)
    assert corpora.hashes(tmp_path / "packed_text_document") == GOLDEN[name]


@pytest.mark.parametrize(
    ("workers", "suffix", "append_eod"),
    [
        (1, "jsonl", True),
        (2, "jsonl", False),
        (3, "jsonl", True),
        (1, "jsonl.gz", False),
        (3, "jsonl.gz", True),
    ],
)
def test_same_bytes_for_any_number_of_workers(model, tmp_path, workers, suffix, append_eod):
    texts = corpora.documents(120)
    expected = corpora.upstream(tmp_path / "upstream", texts, model, append_eod)
    source = corpora.write_jsonl(tmp_path / f"in.{suffix}", texts)
    summary = run(model, source, tmp_path / "out", workers=workers, append_eod=append_eod)
    assert corpora.hashes(tmp_path / "out_text_document") == expected
    manifest = json.loads((tmp_path / "out_text_document.json").read_text())
    assert manifest["documents"] == 120
    assert manifest["lines"]["empty_documents"] == texts.count("") > 0
    assert summary["datasets"][str(tmp_path / "out_text_document")]["tokens"] == manifest["tokens"]
    assert left(tmp_path, "out") == [
        "out_text_document.bin",
        "out_text_document.idx",
        "out_text_document.json",
    ]


@pytest.mark.parametrize("chunk_bytes", [1, 40, 333, 10**6])
def test_lines_are_cut_nowhere(tmp_path, chunk_bytes):
    """Whatever the size of the chunks, every line is in one of them, once; CRLF, blank, unended lines too."""
    data = b'{"text": "a"}\r\n\n' + b"x" * 100 + b"\n\n\n{}\n" + "é".encode() * 30 + b"\nlast"
    (tmp_path / "in.jsonl").write_bytes(data)
    (tmp_path / "in.gz").write_bytes(gzip.compress(data))
    for name in ("in.jsonl", "in.gz"):
        cut = list(chunks(find_sources([str(tmp_path / name)]), chunk_bytes))
        assert [line for chunk in cut for line in lines_of(chunk)] == data.splitlines(keepends=True)


def test_several_keys_and_lists_of_sentences(model, tmp_path):
    texts = corpora.documents(40)
    titles = [["one sentence", "", f"another {i}"] if i % 3 else [] for i in range(40)]
    source = corpora.write_jsonl(tmp_path / "in.jsonl", texts, title=lambda i: titles[i])
    expected = [
        corpora.upstream(tmp_path / "up_text", texts, model),
        corpora.upstream(tmp_path / "up_title", titles, model),
    ]
    run(model, source, tmp_path / "out", json_keys=["text", "title"])
    assert [corpora.hashes(tmp_path / f"out_{key}_document") for key in ("text", "title")] == expected


def test_folders_globs_and_order(model, tmp_path):
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    texts = corpora.documents(60)
    corpora.write_jsonl(folder / "a.jsonl", texts[:20])
    corpora.write_jsonl(folder / "b.json.gz", texts[20:40])
    corpora.write_jsonl(folder / "deeper" / "c.jsonl", texts[40:])
    (folder / "notes.txt").write_text("not JSON")
    expected = corpora.upstream(tmp_path / "upstream", texts, model)
    run(model, folder, tmp_path / "folder")
    run(model, [folder / "*.json*", folder / "deeper" / "c.jsonl"], tmp_path / "globs")
    assert corpora.hashes(tmp_path / "folder_text_document") == expected
    assert corpora.hashes(tmp_path / "globs_text_document") == expected


def test_dedup_keeps_the_first_of_equal_documents(model, tmp_path):
    texts = corpora.documents(60)
    doubled = texts + texts[::2] + ["new"]
    source = corpora.write_jsonl(tmp_path / "in.jsonl", doubled)
    unique = list(dict.fromkeys(doubled))
    expected = corpora.upstream(tmp_path / "upstream", unique, model)
    summary = run(model, source, tmp_path / "out", dedup=True)
    assert corpora.hashes(tmp_path / "out_text_document") == expected
    manifest = summary["datasets"][str(tmp_path / "out_text_document")]
    assert manifest["lines"]["duplicates"] == len(doubled) - len(unique)


def test_shards_joined_are_the_whole(model, tmp_path):
    from megatron_ext.data.merge import merge

    texts = corpora.documents(150)
    plain = corpora.write_jsonl(tmp_path / "a.jsonl", texts[:100])
    packed = corpora.write_jsonl(tmp_path / "b.jsonl.gz", texts[100:])
    expected = corpora.upstream(tmp_path / "upstream", texts, model)
    (tmp_path / "out").mkdir()
    for i in range(4):
        run(model, [plain, packed], tmp_path / "out" / "part", shard=(i, 4))
    prefixes = sorted(str(path)[:-4] for path in (tmp_path / "out").glob("*.idx"))
    assert len(prefixes) == 4
    merge(prefixes, tmp_path / "whole")
    assert corpora.hashes(tmp_path / "whole") == expected


BAD_LINES = {
    "broken": (b'{"text": "cut', "not JSON"),
    "no key": (b'{"title": "x"}', "no key 'text' (keys: 'title')"),
    "number": (b'{"text": 7}', "is a number, not text"),
    "null": (b'{"text": null}', "is null, not text"),
    "list of numbers": (b'{"text": ["a", 7]}', "is a list with a number, not text"),
    "no object": (b'["text"]', "is a list, not a JSON object"),
    "latin-1": ('{"text": "café"}'.encode("latin-1"), "not UTF-8: byte 0xe9"),
    "twice": (b'{"text": "a", "meta": {"text": "b"}, "text": "c"}', "the key 'text' stands in it twice"),
    "surrogate": (b'{"text": "\\ud800"}', "surrogate"),
    "binary": (b"\x00\xff\x01", "not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_stops_the_run_and_leaves_nothing(model, tmp_path, kind):
    line, reason = BAD_LINES[kind]
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(50))
    lines = source.read_bytes().splitlines()
    lines[30], lines[45] = line, line
    source.write_bytes(b"\n".join(lines))
    with pytest.raises(PreprocessError) as error:
        run(model, source, tmp_path / "out", workers=3)
    assert f"{source}: line 31: " in str(error.value)
    assert reason in str(error.value)
    assert left(tmp_path, "out") == []


@pytest.mark.parametrize("how", ["skip", "quarantine"])
def test_bad_lines_are_left_out_counted_and_kept(model, tmp_path, how):
    texts = corpora.documents(50)
    source = corpora.write_jsonl(tmp_path / "in.jsonl", texts)
    lines = source.read_bytes().splitlines()
    bad = {10: BAD_LINES["broken"][0], 20: BAD_LINES["latin-1"][0], 40: BAD_LINES["no key"][0]}
    for number, line in bad.items():
        lines[number] = line
    source.write_bytes(b"\n".join(lines))
    (tmp_path / "empty.jsonl").touch()
    good = [text for i, text in enumerate(texts) if i not in bad]
    expected = corpora.upstream(tmp_path / "upstream", good, model)
    run(model, [source, tmp_path / "empty.jsonl"], tmp_path / "out", on_bad_line=how)
    assert corpora.hashes(tmp_path / "out_text_document") == expected
    assert json.loads((tmp_path / "out_text_document.json").read_text())["lines"]["dropped"] == 4
    notes = [json.loads(line) for line in (tmp_path / "out_bad_lines.jsonl").read_text().splitlines()]
    assert [note["line"] for note in notes] == [11, 21, 41, 0]
    assert notes[3]["file"].endswith("empty.jsonl")
    assert ("content" in notes[0], "content_base64" in notes[1]) == (how == "quarantine",) * 2


@pytest.mark.parametrize("how", ["stop", "quarantine"])
def test_a_truncated_archive(model, tmp_path, how):
    texts = corpora.documents(300)
    source = corpora.write_jsonl(tmp_path / "in.jsonl.gz", texts)
    source.write_bytes(source.read_bytes()[:-200])
    if how == "stop":
        with pytest.raises(PreprocessError, match="gzip data is damaged or cut off"):
            run(model, source, tmp_path / "out")
        assert left(tmp_path, "out") == []
        return
    run(model, source, tmp_path / "out", on_bad_line=how)
    manifest = json.loads((tmp_path / "out_text_document.json").read_text())
    kept = manifest["documents"]
    assert 100 < kept < 300 and manifest["lines"]["dropped"] == 1
    assert corpora.hashes(tmp_path / "out_text_document") == corpora.upstream(
        tmp_path / "upstream", texts[:kept], model
    )


def packed(kind: str, text: bytes) -> bytes:
    """Compressed text, in two members or frames."""
    if kind == "zst":
        compress = pytest.importorskip("zstandard").compress
    else:
        compress = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}[kind]
    half = len(text) // 2
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" if kind == "zst" else b""  # pzstd begins so
    return skipped + compress(text[:half]) + compress(text[half:])


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2", "zst"])
def test_compressed_input(model, tmp_path, kind):
    """Recognised by content, not by name; cut off anywhere, it is not taken for the whole."""
    texts = corpora.documents(300)
    text = corpora.write_jsonl(tmp_path / "plain", texts).read_bytes()
    data, source = packed(kind, text), tmp_path / "in.jsonl"
    source.write_bytes(data)
    run(model, source, tmp_path / "out", chunk_bytes=20_000)
    expected = corpora.upstream(tmp_path / "upstream", texts, model)
    assert corpora.hashes(tmp_path / "out_text_document") == expected
    for cut in (len(data) - 1, len(data) // 3):
        source.write_bytes(data[:cut])
        with pytest.raises(PreprocessError, match="data is damaged or cut off"):
            run(model, source, tmp_path / "out", workers=1, chunk_bytes=len(text))


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2", "zst"])
@pytest.mark.parametrize("damage", ["start", "middle", "behind"])
def test_a_damaged_stream_behind_a_whole_one(model, tmp_path, kind, damage):
    """Readers of xz and bzip2 that take it for the end of the file leave the rest out without a word."""
    text = corpora.write_jsonl(tmp_path / "plain", corpora.documents(60)).read_bytes()
    first, source = packed(kind, text), tmp_path / "in.jsonl"
    second = bytearray(first)
    second[{"start": 1, "middle": len(first) * 3 // 4}.get(damage, 0)] ^= 0x55
    source.write_bytes(first + (b"no archive" if damage == "behind" else bytes(second) + first))
    with pytest.raises(PreprocessError):
        run(model, source, tmp_path / "out", chunk_bytes=10 * len(text))
    assert left(tmp_path, "out") == []


def test_padding_between_and_behind_streams_of_xz(model, tmp_path):
    texts = corpora.documents(60)
    text = corpora.write_jsonl(tmp_path / "plain", texts).read_bytes()
    half, source = len(text) // 2, tmp_path / "in.jsonl"
    source.write_bytes(lzma.compress(text[:half]) + bytes(8192) + lzma.compress(text[half:]) + bytes(4))
    run(model, source, tmp_path / "out")
    expected = corpora.upstream(tmp_path / "upstream", texts, model)
    assert corpora.hashes(tmp_path / "out_text_document") == expected


def test_a_zstd_file_cut_off_behind_a_whole_line(model, tmp_path):
    """What can be unpacked looks whole; only the end of the frame is missing."""
    zstandard = pytest.importorskip("zstandard")
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(20))
    frame = zstandard.ZstdCompressor().compressobj()
    block = frame.compress(source.read_bytes()) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    source.write_bytes(block)
    with pytest.raises(PreprocessError, match="ends within a zstd stream"):
        run(model, source, tmp_path / "out")
    source.write_bytes(block + frame.flush())
    run(model, source, tmp_path / "out")


def test_inputs_that_are_not_there(model, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(PreprocessError, match=r"empty.jsonl: holds no documents"):
        run(model, tmp_path / "empty.jsonl", tmp_path / "out")
    with pytest.raises(SourceError, match="no such file"):
        run(model, tmp_path / "nothing.jsonl", tmp_path / "out")
    with pytest.raises(SourceError, match="no file matches"):
        run(model, tmp_path / "*.gz", tmp_path / "out")
    with pytest.raises(SourceError, match="holds no"):
        run(model, tmp_path / "folder", tmp_path / "out")
    assert left(tmp_path, "out") == []


def test_a_manifest_takes_no_other_files_place(model, tmp_path):
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(20))
    other = corpora.write_jsonl(tmp_path / "out_text_document.json", corpora.documents(3))
    before = other.read_bytes()
    with pytest.raises(ValueError, match="out_text_document.json: is no manifest"):
        run(model, source, tmp_path / "out")
    assert other.read_bytes() == before and left(tmp_path, "out") == [other.name]


def test_an_old_dataset_survives_a_failed_run(model, tmp_path):
    good = corpora.write_jsonl(tmp_path / "good.jsonl", corpora.documents(20))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text":\n')
    run(model, good, tmp_path / "out")
    before = corpora.hashes(tmp_path / "out_text_document")
    with pytest.raises(PreprocessError):
        run(model, tmp_path / "bad.jsonl", tmp_path / "out")
    assert corpora.hashes(tmp_path / "out_text_document") == before


def test_a_second_run_has_nothing_to_do_unless_the_input_changed(model, tmp_path):
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(20))
    run(model, source, tmp_path / "out")
    assert run(model, source, tmp_path / "out")["already_done"]
    corpora.write_jsonl(source, corpora.documents(21))
    assert "already_done" not in run(model, source, tmp_path / "out")


def command(model: Path, source: Path | str, prefix: Path, *more: str) -> list[str]:
    return [
        sys.executable, str(TOOL), "--input", str(source), "--output-prefix", str(prefix), "--append-eod",
        "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(model), "--workers", "2", *more,
    ]  # fmt: skip


def wait_for_end_of_group(group: int) -> None:
    """Wait until the workers noticed that their parent is gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("workers outlived the run")


def kill_after_parts(words: list, prefix: Path, target: int) -> None:
    """kill -9 a run at random, soon after so many parts are finished; nothing is in place then."""
    work = prefix.with_name(f"{prefix.name}_preprocess_work")
    process = subprocess.Popen(
        words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(work.glob("part-*[0-9].json"))) < target and process.poll() is None:
        assert time.monotonic() < deadline, "no part was finished within a minute"
        time.sleep(0.002)
    time.sleep(random.random() * 0.05)
    process.kill()
    process.wait()
    wait_for_end_of_group(process.pid)
    assert not prefix.with_name(f"{prefix.name}_text_document.json").exists()


def test_killed_at_any_moment_it_goes_on(model, tmp_path):
    """kill -9 of the run, three times at random; then it ends with upstream's bytes and reused parts."""
    texts = corpora.documents(12000)
    source = corpora.write_jsonl(tmp_path / "in.jsonl", texts)
    expected = corpora.upstream(tmp_path / "upstream", texts, model)
    for target in (1, 3, 6):
        kill_after_parts(command(model, source, tmp_path / "out"), tmp_path / "out", target)
    result = subprocess.run(
        command(model, source, tmp_path / "out", "--json"), capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout)["parts_reused"] >= 6
    assert corpora.hashes(tmp_path / "out_text_document") == expected
    assert not (tmp_path / "out_preprocess_work").exists()


def test_standard_input_and_a_signal(model, tmp_path):
    """SIGTERM keeps the work; the same stream again is not encoded again."""
    texts = corpora.documents(200)
    source = corpora.write_jsonl(tmp_path / "in.jsonl", texts)
    expected = corpora.upstream(tmp_path / "upstream", texts, model)
    stream = command(model, "-", tmp_path / "out", "--json")
    process = subprocess.Popen(stream, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(source.read_bytes())
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not (tmp_path / "out_preprocess_work" / "plan").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 128 + signal.SIGTERM
    assert said.endswith("preprocess_data.py: terminated; the same command goes on where it was\n")
    with open(source, "rb") as file:
        subprocess.run(stream, stdin=file, check=True, stdout=subprocess.DEVNULL)
    assert corpora.hashes(tmp_path / "out_text_document") == expected


def test_a_killed_worker_ends_the_run_with_a_reason(model, tmp_path, monkeypatch):
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(50))
    with monkeypatch.context() as patched:  # inherited by the forked workers
        patched.setattr(documents, "load_record", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(WorkerFailed, match="SIGKILL"):
            run(model, source, tmp_path / "out")
    run(model, source, tmp_path / "out")
    assert left(tmp_path, "out") == [
        "out_text_document.bin",
        "out_text_document.idx",
        "out_text_document.json",
    ]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--split-sentences"], "documents"),
        (["--vocab-file", "x"], "--tokenizer-model"),
        (["--shard", "4/4"], "counts from 0"),
        (["--shard", "0/2", "--dedup"], "give one of them"),
        (["--shard", "0/2", "--dedup", "--json-keys", "a", "a"], "give one of them; --json-keys"),
        (["--workers", "0"], "above 0"),
        (["--json-keys", "a/b"], "file name"),
        (["--append"], "unrecognized"),
    ],
)
def test_bad_usage(tmp_path, more, reason, capsys):
    import importlib.util

    spec = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    words = command(Path("m"), "in", tmp_path / "out", *more)[2:]
    with pytest.raises(SystemExit) as end:
        tool.main(words)
    assert end.value.code == 2
    assert reason in capsys.readouterr().err
