"""Inputs are never replaced by outputs, outputs never become input, and a change while reading is seen."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.common.files import InputChanged, OverwritesInput, refuse_overwriting, unchanged
from megatron_ext.data import merge as merging
from megatron_ext.data.indexed import check_layout
from megatron_ext.data.rounds import build_round as drawing
from megatron_ext.data.text import inputs
from megatron_ext.data.text.chunks import chunks, lines_of
from megatron_ext.data.text.documents import Documents
from megatron_ext.data.text.sources import SourceError, find_sources
from megatron_ext.preprocess import retokenize as translating
from megatron_ext.preprocess import run as running
from megatron_ext.preprocess.options import Options, PreprocessError
from megatron_ext.tokenizer import train as training
from megatron_ext.tokenizer.counts import count_text
from megatron_ext.tokenizer.encoder import NativeEncoder
from tests.unit.data import corpora
from tools import (
    build_round,
    compress_tokenizer,
    convert_checkpoint,
    make_demo_corpus,
    merge_datasets,
    plot_forgetting,
    plot_metrics,
    preprocess_data,
    retokenize_dataset,
    train_tokenizer,
)

OUT = "--output-prefix"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return corpora.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def there(model, tmp_path, monkeypatch) -> Path:
    """A folder with one input of each kind, entered; ``link`` is another name of it."""
    monkeypatch.chdir(tmp_path)
    corpora.write_jsonl(Path("in.jsonl"), corpora.documents(60))
    for name in (
        "my_bad_lines.jsonl",
        "my_preprocess_work/in.jsonl",
        "report/report.json",
        "x_hf/tokenizer.json",
    ):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(Path("in.jsonl").read_bytes())
    for name in ("big.model", "x_hf/tokenizer.model"):
        Path(name).write_bytes(model.read_bytes())
    for name in ("a", "b"):
        corpora.make_dataset(Path(name), [5, 6, 7])
    np.save("losses.npy", np.random.default_rng(0).gamma(4, 1, 50).astype(np.float32))
    record = {"iteration": 1, "lm_loss": 2.0, "consumed_tokens": 8, "tokens_per_second": 1.0}
    Path("metrics.jsonl").write_text(json.dumps(record) + "\n")
    Path("link").symlink_to(".")
    os.link("losses.npy", "hard.npy")
    return tmp_path


def tokenizer(path: str = "big.model") -> list[str]:
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", path]


HF = ["--from", "hf", "--to", "megatron"]
REPORT = "report/report.json"
INNER = "my_preprocess_work/in.jsonl"
TRAIN = ["--vocab-size", "300", "--input"]
COMPRESS = ["--input", "in.jsonl", "--vocab-size", "380", "--tokenizer-model"]
RETOKENIZE = ["--old-tokenizer-model", "big.model", "--new-tokenizer-model", "big.model"]
#: tool, its words, the input that its output is.
OVERWRITING = [
    (preprocess_data, ["--input", "my_bad_lines.jsonl", OUT, "link/my", *tokenizer()], "my_bad_lines.jsonl"),
    (
        preprocess_data,
        ["--input", "my_preprocess_work/in.jsonl", OUT, "my", *tokenizer()],
        "my_preprocess_work",
    ),
    (train_tokenizer, [*TRAIN, "in.jsonl", "--output", "./in.jsonl"], "in.jsonl"),
    (
        train_tokenizer,
        [*TRAIN, "link/in.jsonl", "--output", "in.jsonl"],
        "in.jsonl",
    ),
    (
        compress_tokenizer,
        [*COMPRESS, "big.model", "--output", "link/big"],
        "big.model",
    ),
    (compress_tokenizer, [*COMPRESS, "x_hf/tokenizer.model", "--output", "x"], "x_hf/tokenizer.model"),
    (
        compress_tokenizer,
        [*COMPRESS, "big.model", "--output", "o", "--validation", REPORT, "--report", "./report"],
        "report/report.json",
    ),
    (merge_datasets, ["--input", "a", "b", OUT, "./a"], "a.bin"),
    (merge_datasets, ["--input", "link/a", "b", OUT, "a"], "a.bin"),
    (retokenize_dataset, ["--input", "a", OUT, "link/a", *RETOKENIZE], "a.bin"),
    (build_round, ["--losses", "losses", "--rate", "0.5", "--output", "link/losses"], "losses.npy"),
    (build_round, ["--losses", "losses.npy", "--rate", "0.5", "--output", "hard"], "hard.npy"),
    (plot_forgetting, ["losses", "--output", "link/losses.npy"], "losses.npy"),
    (plot_metrics, ["metrics.jsonl", "--output", "link/metrics.jsonl"], "metrics.jsonl"),
]


def everything(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("tool", "words", "named"), OVERWRITING)
def test_no_tool_replaces_its_input(there, capsys, tool, words, named):
    before = everything(there)
    assert tool.main(words) == 1
    assert f"{named}: would be written or removed" in capsys.readouterr().err.replace("link/", "")
    assert everything(there) == before


def test_two_names_of_one_place_are_bad_usage(there, capsys):
    calls = [
        (make_demo_corpus, ["--output", "new.jsonl", "--valid-output", "link/new.jsonl"]),
        (
            convert_checkpoint,
            ["--from", "hf", "--to", "megatron", "--load", "report", "--save", "link/report"],
        ),
    ]
    for tool, words in calls:
        with pytest.raises(SystemExit) as end:
            tool.main(words)
        assert end.value.code == 2
        assert "are the same" in capsys.readouterr().err


def test_counts_may_be_used_again_under_their_own_name(there, capsys):
    """The step after counting; they are not added to themselves."""
    common = ["--tokenizer-model", "big.model", "--output", "o"]
    assert compress_tokenizer.main(["--input", "in.jsonl", *common]) == 0
    before = Path("o.counts.npz").read_bytes()
    again = ["--counts", "o.counts.npz", *common, "--vocab-size", "380"]
    assert compress_tokenizer.main(again) == 0
    assert Path("o.counts.npz").read_bytes() == before
    assert compress_tokenizer.main([*again, "--input", "in.jsonl"]) == 1
    assert "o.counts.npz: would be written" in capsys.readouterr().err


def test_spellings_of_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    Path("folder/inner").touch()
    Path("link").symlink_to("file")
    os.link("file", "hard")
    for output, read in [
        ("file", "./file"), ("file", "folder/../file"), ("file", tmp_path / "file"), ("file", "link"),
        ("link", "file"), ("hard", "file"), ("not there", "./not there"), ("folder", "folder/inner"),
    ]:  # fmt: skip
        with pytest.raises(OverwritesInput):
            refuse_overwriting(["other", output], ["more", read])
    refuse_overwriting(["folder/other", "fil"], ["file", "folder/inner", "folder"])


def test_output_in_the_input_folder_is_no_input(model, tmp_path):
    """Of this run, of other shards and other names, and of other tools."""
    texts = corpora.documents(40)
    corpora.write_jsonl(tmp_path / "a.jsonl", texts[:20])
    corpora.write_jsonl(tmp_path / "b.jsonl", ['{"file": "', *texts[21:]])
    expected = corpora.upstream(tmp_path / "upstream", [*texts[:20], '{"file": "', *texts[21:]], model)
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write("broken\n")

    def run(name: str, **more) -> dict:
        options = Options(
            [str(tmp_path)], str(tmp_path / name), corpora.flags(model), append_eod=True,
            on_bad_line="quarantine", **more,
        )  # fmt: skip
        return running.preprocess(options, quiet=True)

    for i in range(2):
        run("shards", shard=(i, 2))
    (tmp_path / "killed_preprocess_work").mkdir()
    (tmp_path / "killed_preprocess_work" / "part-000001.json").write_text("{}")
    for name in ("my", "other", "my"):
        done = run(name)
        assert corpora.hashes(tmp_path / f"{name}_text_document") == expected
    assert done["already_done"]
    assert [Path(source.path).name for source in find_sources([str(tmp_path / "*.json*")])] == [
        "a.jsonl",
        "b.jsonl",
    ]


def test_a_file_that_is_named_twice(tmp_path):
    """Given by folder and by name, by two globs, or by a link: its documents would be read twice."""
    (tmp_path / "in").mkdir()
    for name in ("in/a.jsonl", "in/b.jsonl"):
        corpora.write_jsonl(tmp_path / name, corpora.documents(3))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in" / "a.jsonl")
    folder, file, glob = str(tmp_path / "in"), str(tmp_path / "in" / "a.jsonl"), str(tmp_path / "in" / "*")
    for words in (
        [folder, file],
        [file, file],
        [glob, f"{glob}.jsonl"],
        [str(tmp_path / "link.jsonl"), file],
    ):
        with pytest.raises(SourceError, match=r"a.jsonl: is named twice, by .* and by "):
            find_sources(words)
    assert len(find_sources([file, str(tmp_path / "in" / "b.jsonl")])) == 2


def change(how: str, path: Path) -> None:
    """A change of an input while it is read."""
    state, data = path.stat(), path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, len(data) // 2)
    elif how == "replaced":
        (path.parent / "new").write_bytes(data)
        os.replace(path.parent / "new", path)
    else:
        changed = (
            data + data[: data.find(b"\n") + 1] if how == "appended" else data[:-9] + data[-9:].swapcase()
        )
        path.write_bytes(changed)
        if how == "dated back":
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


CHANGES = ["truncated", "appended", "rewritten", "dated back", "replaced", "removed"]


def options(source: Path, model: Path, **more) -> Options:
    prefix = str(source.parent / "out")
    return Options([str(source)], prefix, corpora.flags(model), workers=2, chunk_bytes=2000, **more)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
@pytest.mark.parametrize("moment", ["first", "last"])
def test_an_input_that_changes_makes_no_dataset(model, tmp_path, monkeypatch, name, how, moment):
    """After the first part is done, and after the last; whatever is done with bad lines."""
    source = corpora.write_jsonl(tmp_path / name, corpora.documents(120))
    done, check = running._Run._done, running._Run._inputs

    def then_changes(method):
        def changing(self, *args, **kwargs):
            if not getattr(self, "changed", False):
                self.changed = True
                change(how, source)
            return method(self, *args, **kwargs)

        return changing

    with monkeypatch.context() as patched:
        if moment == "first":
            patched.setattr(running._Run, "_done", then_changes(done))
        else:
            patched.setattr(running._Run, "_inputs", then_changes(check))
        with pytest.raises((InputChanged, PreprocessError), match=f"{name}: was written to, repl"):
            running.preprocess(options(source, model, on_bad_line="skip"), quiet=True)
    assert not list(tmp_path.glob("out_text*"))
    if how != "removed" and name == "in.jsonl" and how != "truncated":
        running.preprocess(options(source, model), quiet=True)
        fresh = options(source, model)
        fresh.output_prefix = str(tmp_path / "fresh")
        running.preprocess(fresh, quiet=True)
        assert corpora.hashes(tmp_path / "out_text_document") == corpora.hashes(
            tmp_path / "fresh_text_document"
        )


def test_parts_of_other_content_with_the_same_date_are_not_taken(model, tmp_path, monkeypatch):
    """A killed run whose input was rewritten and dated back: size and time are unchanged."""
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(120))
    with monkeypatch.context() as patched:
        patched.setattr(running._Run, "_assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            running.preprocess(options(source, model), quiet=True)
    assert list(tmp_path.glob("out_preprocess_work/part-*.json"))
    change("dated back", source)
    with pytest.raises(PreprocessError, match=r"in.jsonl: was written to, replaced or removed"):
        running.preprocess(options(source, model), quiet=True)
    summary = running.preprocess(options(source, model), quiet=True)
    assert summary["parts_reused"] == 0


def test_links_and_permissions_may_change(model, tmp_path, monkeypatch):
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(120))
    check = running._Run._inputs

    def checked(self):
        source.chmod(0o400)
        os.link(source, tmp_path / "backup")
        return check(self)

    monkeypatch.setattr(running._Run, "_inputs", checked)
    summary = running.preprocess(options(source, model), quiet=True)
    [manifest] = summary["datasets"].values()
    assert manifest["inputs"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.parametrize("chunk_bytes", [1, 40, 333, 999, 1 << 20])
@pytest.mark.parametrize("end", [b"", b"\n", b"x" * 3000, b"\n" * 500])
def test_digests_are_those_of_what_the_workers_read(tmp_path, monkeypatch, chunk_bytes, end):
    monkeypatch.setattr(inputs, "BUFFER", 1000)
    lines = [b"x" * (97 * i % 413) + b"\n" for i in range(20)]
    data = b"".join(lines) + end
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    whole, pieces = inputs.digests(str(path), chunk_bytes)
    assert whole == hashlib.sha256(data).hexdigest()
    cut = list(chunks(find_sources([str(path)]), chunk_bytes))
    assert sorted(pieces) == [chunk.begin for chunk in cut]
    for chunk in cut:
        documents = Documents(chunk, ["text"])
        list(documents)
        assert documents.digest.hexdigest() == pieces[chunk.begin]
    assert b"".join(line for chunk in cut for line in lines_of(chunk)) == data


@pytest.mark.parametrize("how", CHANGES)
def test_a_text_that_changes_makes_no_tokenizer(model, tmp_path, monkeypatch, how):
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(120))
    train = training._train

    def meanwhile(texts, vocab_size):
        change(how, source)
        return train(texts, vocab_size)

    with monkeypatch.context() as patched:
        patched.setattr(training, "_train", meanwhile)
        with pytest.raises(InputChanged, match=r"in.jsonl: was written to"):
            training.train_tokenizer(
                [str(source)], tmp_path / "o.model", 300, key="text", sample_bytes=10**9, seed=1
            )
    assert not (tmp_path / "o.model").exists()

    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(120))

    class Meanwhile:
        def add_text(self, *_):
            if source.exists():
                change(how, source)

    with pytest.raises(InputChanged, match=r"in.jsonl: was written to"):
        count_text(find_sources([str(source)]), NativeEncoder(model), "", 1, progress=Meanwhile())


@pytest.mark.parametrize("how", ["appended", "dated back", "replaced"])
def test_a_dataset_that_changes_is_not_joined_or_translated(there, monkeypatch, how):
    corpora.make_dataset(Path("ids"), [3] * 40, vocabulary=390, seed=4)
    ids = np.fromfile("ids.bin", np.uint16) + 3
    ids.tofile("ids.bin")
    blocks, translate, finite = merging.file_blocks, translating._translated, drawing.check_finite

    def meanwhile(path: str, function):
        def changing(*args):
            change(how, Path(path))
            return function(*args)

        return changing

    monkeypatch.setattr(merging, "file_blocks", meanwhile("a.idx", blocks))
    monkeypatch.setattr(translating, "_translated", meanwhile("ids.bin", translate))
    monkeypatch.setattr(drawing, "check_finite", meanwhile("losses.npy", finite))
    with pytest.raises(InputChanged, match=r"a.idx: was written to"):
        merging.merge(["a", "b"], "out")
    with pytest.raises(InputChanged, match=r"ids.bin: was written to"):
        translating.retokenize("ids", "big.model", "big.model", "out")
    with pytest.raises(InputChanged, match=r"losses.npy: was written to"):
        drawing.build_round("losses.npy", drawing.RoundOptions(rate=0.5), "out")
    assert not list(there.glob("out*"))


def test_a_flipped_bit_is_not_merged(model, tmp_path, monkeypatch):
    """Also for a .bin of which training compares only pieces at its start."""
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(120))
    running.preprocess(options(source, model), quiet=True)
    path = tmp_path / "out_text_document.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(merging, "check_dataset", lambda prefix: check_layout(prefix))
    with pytest.raises(ValueError, match=r"out_text_document.bin: its sha256 is not the manifest's"):
        merging.merge([str(path)[:-4]], tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_a_change_explains_another_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("a")
    with pytest.raises(InputChanged), unchanged([path, tmp_path / "not there"]):
        path.write_text("bc")
        raise RuntimeError("what it led to")
    with pytest.raises(RuntimeError), unchanged([path]):
        raise RuntimeError("its own")


def test_compressed_inputs_have_the_sha256_of_their_files(model, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(gzip.compress(corpora.write_jsonl(tmp_path / "x", corpora.documents(60)).read_bytes()))
    summary = running.preprocess(options(source, model), quiet=True)
    [manifest] = summary["datasets"].values()
    assert manifest["inputs"] == [
        {
            "name": str(source),
            "bytes": source.stat().st_size,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
    ]
