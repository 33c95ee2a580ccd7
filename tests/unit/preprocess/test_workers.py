"""Workers end with their parent, keep out of a later run's files, and name what they died of."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_ext.data.text import pool
from megatron_ext.data.text.chunks import chunks
from megatron_ext.data.text.pool import WorkerFailed
from megatron_ext.data.text.sources import find_sources
from megatron_ext.data.writer import publish, write_dataset
from megatron_ext.preprocess import run as running
from megatron_ext.preprocess import work_folder
from megatron_ext.preprocess.options import Options, PreprocessError
from megatron_ext.tokenizer import encoding
from megatron_ext.tokenizer.checked import Encoder
from megatron_ext.tokenizer.counts import count_text
from megatron_ext.tokenizer.encoder import NativeEncoder
from tests.unit.data import corpora
from tests.unit.preprocess.test_preprocess import TOOL, command

POISON = "poison"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return corpora.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def poisoned(tmp_path) -> Path:
    """250 documents, about 40 of them in the chunk of line 201, which is poison."""
    texts = corpora.documents(250)
    texts[200] = POISON
    return corpora.write_jsonl(tmp_path / "in.jsonl", texts)


def encoder(action) -> Encoder:
    """An encoder of one id a text that does ``action()`` over the poison."""

    def encode(texts: list[bytes]):
        if POISON.encode() in texts:
            action()
        return np.full(len(texts), 7, np.uint16), np.ones(len(texts), np.int32)

    return Encoder("test", encode)


def options(source: Path, model: Path, how: str = "stop") -> Options:
    prefix = str(source.parent / "out")
    return Options([str(source)], prefix, corpora.flags(model), workers=2, chunk_bytes=6000, on_bad_line=how)


def preprocess(monkeypatch, source: Path, model: Path, action, how: str = "stop") -> dict:
    tokenizer, _ = encoding.load(corpora.flags(model))
    monkeypatch.setattr(encoding, "load", lambda *_: (tokenizer, encoder(action)))
    return running.preprocess(options(source, model, how), quiet=True)


class Panic(BaseException):
    """What a Rust library raises: no Exception."""


def panic():
    raise Panic("index out of bounds\nnote: run with RUST_BACKTRACE=1")


def overflow():
    raise OverflowError("too large")


@pytest.mark.parametrize("action", [panic, overflow])
def test_a_text_that_breaks_the_tokenizer_is_a_bad_line(model, monkeypatch, poisoned, action):
    with pytest.raises(
        PreprocessError, match=r"in.jsonl: line 201: cannot be encoded: \w+: [a-z ]+\. Nothing"
    ):
        preprocess(monkeypatch, poisoned, model, action)
    summary = preprocess(monkeypatch, poisoned, model, action, "skip")
    [manifest] = summary["datasets"].values()
    assert (manifest["documents"], manifest["lines"]["dropped"]) == (249, 1)
    [note] = map(json.loads, (poisoned.parent / "out_bad_lines.jsonl").read_text().splitlines())
    assert note["line"] == 201 and "cannot be encoded" in note["reason"]


def test_a_panic_of_a_real_library(tmp_path, monkeypatch, capfd):
    """A regular expression that gives up; the tokenizer works on afterwards."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"a": 0, "w": 1, "</s>": 2, "[UNK]": 3}, unk_token="[UNK]")
    fast = tokenizers.Tokenizer(model)
    pattern = tokenizers.Regex("(a+)+$|\\w+")
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    (tmp_path / "tok").mkdir()
    fast.save(str(tmp_path / "tok" / "tokenizer.json"))
    config = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config))
    texts = ["w w w"] * 50
    texts[20] = "a" * 40 + "b"
    source = corpora.write_jsonl(tmp_path / "in.jsonl", texts)
    flags = corpora.flags(tmp_path / "tok")
    flags.tokenizer_type = "HuggingFaceTokenizer"
    for how in ("stop", "quarantine"):
        asked = Options([str(source)], str(tmp_path / "out"), flags, on_bad_line=how)
        if how == "stop":
            with pytest.raises(PreprocessError, match=r"line 21: cannot be encoded: PanicException: "):
                running.preprocess(asked, quiet=True)
            continue
        [manifest] = running.preprocess(asked, quiet=True)["datasets"].values()
        assert manifest["documents"] == 49 and manifest["tokens"] > 49
    [note] = map(json.loads, (tmp_path / "out_bad_lines.jsonl").read_text().splitlines())
    assert json.loads(note["content"])["text"] == texts[20]


def test_a_number_too_large_for_an_id(tmp_path, capfd):
    source = corpora.write_jsonl(tmp_path / "in.jsonl", ["1 2", "9" * 30, "3", "5 300"])
    words = [
        sys.executable, str(TOOL), "--input", str(source), "--output-prefix", str(tmp_path / "out"),
        "--tokenizer-type", "NullTokenizer", "--vocab-size", "255",
    ]  # fmt: skip
    assert subprocess.run(words).returncode == 1
    assert "line 2: cannot be encoded: " in capfd.readouterr().err
    subprocess.run([*words, "--on-bad-line", "skip"], check=True)
    notes = map(json.loads, (tmp_path / "out_bad_lines.jsonl").read_text().splitlines())
    assert [note["line"] for note in notes] == [2, 4]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"SIGSEGV\); the tokenizer crashed on one of them"),
        (lambda: os.kill(os.getpid(), signal.SIGABRT), r"SIGABRT\); the tokenizer crashed on one of them"),
        (lambda: os._exit(3), r"exit code 3\); the tokenizer crashed on one of them"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"SIGKILL\); probably out of memory"),
    ],
)
def test_a_worker_that_dies_names_the_lines(model, monkeypatch, poisoned, how, told):
    with pytest.raises(WorkerFailed) as error:
        preprocess(monkeypatch, poisoned, model, how)
    found = re.search(rf"in.jsonl: lines (\d+) to (\d+): a worker died \({told}", str(error.value))
    assert 150 < int(found[1]) <= 201 <= int(found[2]) <= 250


def test_a_counting_worker_that_dies_names_the_lines(model, monkeypatch, poisoned):
    """multiprocessing's own pool would wait for it for ever."""

    class Dies(NativeEncoder):
        def add_histogram(self, texts, histogram):
            encoder(lambda: os.kill(os.getpid(), signal.SIGSEGV))(texts)

    with pytest.raises(WorkerFailed, match=r"in.jsonl: lines 1 to 250: a worker died \(SIGSEGV"):
        count_text(find_sources([str(poisoned)]), Dies(model), "", 2)

    class Panics(NativeEncoder):
        def add_histogram(self, texts, histogram):
            encoder(panic).encode(texts)
            super().add_histogram(texts, histogram)

    with pytest.raises(ValueError, match=r"in.jsonl: line 201: cannot be encoded: Panic"):
        count_text(find_sources([str(poisoned)]), Panics(model), "", 2)
    counts, left_out = count_text(find_sources([str(poisoned)]), Panics(model), "", 2, on_bad_line="skip")
    assert counts.documents.sum() == 249 and left_out.count == 1
    assert "in.jsonl: line 201" in str(left_out)


def test_a_text_that_takes_for_ever_is_named(model, monkeypatch, poisoned, capfd):
    monkeypatch.setattr(pool, "SLOW_SECONDS", 0.5)
    preprocess(monkeypatch, poisoned, model, lambda: time.sleep(2))
    assert "a worker has been busy with them" in capfd.readouterr().err


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if children := process.children():
            return children
        time.sleep(0.005)
    raise AssertionError("no worker")


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("stopped", [False, True])
def test_an_orphan_writes_nothing_into_the_next_run(model, tmp_path, stopped):
    """A worker within a chunk, or stopped there by a slow disk, when its parent is killed."""
    texts = corpora.documents(30_000)
    source = corpora.write_jsonl(tmp_path / "in.jsonl", texts)
    expected = corpora.upstream(tmp_path / "upstream", texts, model)
    work = tmp_path / "out_preprocess_work"
    first = subprocess.Popen(command(model, source, tmp_path / "out"), stderr=subprocess.DEVNULL)
    orphans = workers_of(psutil.Process(first.pid))
    wait_until(lambda: list(work.glob("part-*.lengths")))
    if stopped:
        for orphan in orphans:
            orphan.suspend()
    first.kill()
    first.wait()
    if not stopped:
        wait_until(lambda: all(map(gone, orphans)))
    subprocess.run(command(model, source, tmp_path / "out"), check=True, capture_output=True)
    for orphan in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.resume()
    wait_until(lambda: all(map(gone, orphans)))
    assert corpora.hashes(tmp_path / "out_text_document") == expected
    assert not work.exists()


def test_workers_of_a_counter_end_with_it(model, tmp_path):
    """Also idle ones, which wait for work that nobody will send."""
    code = (
        "import sys, time; from megatron_ext.data.text import pool; "
        "from megatron_ext.data.text.chunks import Chunk\n"
        "def chunks():\n"
        "    print('ready', flush=True); time.sleep(60); yield Chunk(0, 0, '')\n"
        "pool.run_chunks(chunks(), 3, lambda chunk, note: None, lambda *_: None)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        workers = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
    assert len(workers) == 3
    wait_until(lambda: all(map(gone, workers)))


def test_a_run_waits_for_workers_that_the_system_cannot_end(monkeypatch, tmp_path):
    """Where there is no such thing as ending with a parent, they hold the lock as long as they live."""
    monkeypatch.setattr(pool, "end_with_parent", lambda parent: False)
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    worker = pool._Worker(lambda chunk, note: None, lock)
    os.close(lock)
    other = os.open(tmp_path / "lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    worker.stop()
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_one_run_at_a_time(model, tmp_path, monkeypatch):
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(20))
    monkeypatch.setattr(work_folder, "WAIT_SECONDS", 0.1)
    asked = options(source, model)
    progress = running.Progress("processed", None, quiet=True)
    with work_folder.work_folder(asked.work_folder, "plan", progress):
        with pytest.raises(OSError, match="another run is writing this output"):
            running.preprocess(asked, quiet=True)
        assert (asked.work_folder / "plan").read_text() == "plan"
    running.preprocess(asked, quiet=True)
    assert not asked.work_folder.exists()


def test_one_dataset_at_a_time(tmp_path):
    """Two joins, say, into one name: the second does not write into what the first has in hand."""
    lengths, bounds = np.ones(3, np.int32), np.arange(4)
    first = write_dataset(
        tmp_path / "x", [np.arange(3, dtype=np.uint16).tobytes()], np.uint16, lengths, bounds
    )
    with pytest.raises(OSError, match=r"x.idx.aside: another run is writing this output"):
        write_dataset(tmp_path / "x", [bytes(6)], np.uint16, lengths, bounds)
    publish(first, {})
    assert np.fromfile(tmp_path / "x.bin", np.uint16).tolist() == [0, 1, 2]
    second = write_dataset(tmp_path / "x", [bytes(6)], np.uint16, lengths, bounds)
    second.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_a_worker_that_is_deaf_to_sigterm_ends_with_the_others(tmp_path):
    """As one is that has not set its handlers yet, in a process that handles the signal."""
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(40))

    def work(chunk, note):
        if chunk.number == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (tmp_path / "deaf").touch()
            time.sleep(60)
        while not (tmp_path / "deaf").exists():
            time.sleep(0.01)
        return chunk.number

    def done(chunk, answer):
        raise ValueError("elsewhere")

    start = time.monotonic()
    with pytest.raises(ValueError, match="elsewhere"):
        pool.run_chunks(chunks(find_sources([str(source)]), 1000), 2, work, done)
    assert time.monotonic() - start < 30
