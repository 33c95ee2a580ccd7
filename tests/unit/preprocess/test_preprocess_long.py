"""Preprocessing at length, minutes of work: only with LONG_TESTS=1 (make test-long)."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.unit.data import corpora
from tests.unit.preprocess.test_preprocess import command, wait_for_end_of_group

pytestmark = pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="minutes of work: LONG_TESTS=1")
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return corpora.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def start(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def test_twenty_kills_at_random_moments(model, tmp_path):
    """From start-up to the last rename: whatever is left behind, the end is upstream's bytes."""
    texts = corpora.documents(40_000)
    source = corpora.write_jsonl(tmp_path / "in.jsonl", texts)
    expected = corpora.upstream(tmp_path / "upstream", texts, model)
    out, rng = tmp_path / "out", random.Random()
    words, marker = command(model, source, out), Path(f"{out}_text_document.json")
    kills = reached = 0
    longest = 2.0  # seconds that a run takes, learnt from those that end before they are killed
    while kills < 20:
        process, begun = start(words), time.monotonic()
        try:
            process.wait(rng.random() * longest)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            longest = time.monotonic() - begun
        wait_for_end_of_group(process.pid)
        if marker.exists():
            reached += 1
            assert corpora.hashes(Path(f"{out}_text_document")) == expected
            for left in tmp_path.glob("out_*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert corpora.hashes(Path(f"{out}_text_document")) == expected
    print(f"20 kills; {reached} runs came to their end in between")


def peak_of(words: list[str]) -> int:
    """Bytes of memory that a command and its children need at most, shared pages counted once."""
    process = start(words)
    parent, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for member in [parent, *parent.children(recursive=True)]:
            try:
                total += member.memory_full_info().pss
            except psutil.Error:
                continue  # it ended meanwhile
        peak = max(peak, total)
        time.sleep(0.1)
    assert process.returncode == 0
    return peak


def test_a_gigabyte_in_bounded_memory(model, tmp_path):
    """Sixteen times the input takes no more memory than its documents' entries in the index."""
    block = corpora.write_jsonl(tmp_path / "block.jsonl", corpora.documents(20_000)).read_bytes()
    peaks = {}
    for size in (64 * MIB, 1024 * MIB):
        source = tmp_path / "in.jsonl"
        with open(source, "wb") as file:
            for _ in range(size // len(block) + 1):
                file.write(block)
        peaks[size] = peak_of(command(model, source, tmp_path / "out"))
        documents = json.loads((tmp_path / "out_text_document.json").read_text())["documents"]
        for left in tmp_path.glob("out_*"):
            left.unlink()
        print(f"{size >> 20} MiB, {documents:,} documents: {peaks[size] / MIB:.0f} MiB of memory")
    small, large = peaks.values()
    assert large < small + 40 * documents + 64 * MIB


def test_a_line_of_hundreds_of_megabytes(model, tmp_path):
    """One document of 300 MB goes through, in 16 times its size."""
    text = corpora.documents(1, seed=3)[0] or "text"
    text = (text + " ") * (300 * 10**6 // len(text.encode()))
    source = corpora.write_jsonl(tmp_path / "in.jsonl", ["before", text, "after"])
    peak = peak_of(command(model, source, tmp_path / "out", "--workers", "1"))
    manifest = json.loads((tmp_path / "out_text_document.json").read_text())
    assert manifest["documents"] == 3
    print(f"{len(text) / 1e6:.0f} M characters: {peak / MIB:.0f} MiB of memory", file=sys.stderr)
    assert peak < 16 * source.stat().st_size
