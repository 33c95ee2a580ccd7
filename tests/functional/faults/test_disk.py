"""Disks that are full or read-only, and files that were cut, emptied, altered or lost."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import checkpoint_dir, latest_iteration, load
from megatron_ext.data import DatasetError
from megatron_ext.data.inspect import report, verify
from megatron_ext.data.manifest import check_dataset
from megatron_ext.training.saving import Saver
from tests.conftest import REPOSITORY
from tests.functional.test_run import BASE
from tests.helpers.faults import fused_run, newest_whole, steps_in
from tests.helpers.pool import WorkerError
from tests.helpers.training import flags
from tests.unit.data import corpora

RUN = BASE | dict(train_iters=8, save_interval=1, eval_iters=0)
DAMAGES = int(os.environ.get("FAULT_DAMAGES", 60))
SEED = os.environ.get("FAULT_SEED", "0")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 6 MiB: a few checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    while subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False).returncode == 0:
        pass


@pytest.mark.parametrize("more", [{}, {"async_save": True}], ids=["sync", "async"])
def test_full_disk(pool, small_disk, tmp_path, more):
    """The save that does not fit fails on all ranks; its predecessor is intact and the run resumes."""
    argv = flags(**RUN | dict(save=small_disk / "run", load=small_disk / "run") | more)
    with pytest.raises(WorkerError) as failed:
        pool.run(2, fused_run, argv, None)
    assert str(failed.value).count("No space left on device") >= 2
    newest = newest_whole(small_disk / "run")
    assert 1 <= newest < RUN["train_iters"]
    names = {entry.name for entry in (small_disk / "run").iterdir()}
    assert not any(name.startswith(".incomplete") for name in names)

    metrics = tmp_path / "metrics.jsonl"
    elsewhere = dict(save=tmp_path / "run", load=small_disk / "run", metrics_file=metrics)
    pool.run(2, fused_run, flags(**RUN | elsewhere), None)
    assert [step["iteration"] for step in steps_in(metrics)] == list(range(newest + 1, 9))


def read_only_from_the_third_save(argv: list[str], place: str) -> None:
    """The disk turns read-only, as it does after an error, before the third save."""
    original, count = Saver.save, 0

    def save(saver, progress):
        nonlocal count
        count += 1
        if count == 3 and torch.distributed.get_rank() == 0:
            # Another mount of it on top: the one below has files open for writing, such as the lock.
            subprocess.run(["mount", "--bind", place, place], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        return original(saver, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", save)
        fused_run(argv, None)


def test_read_only_folder(pool, small_disk, tmp_path):
    argv = flags(**RUN | dict(save=small_disk / "run", load=small_disk / "run"))
    with pytest.raises(WorkerError) as failed:
        pool.run(2, read_only_from_the_third_save, argv, str(small_disk))
    assert str(failed.value).count("Read-only file system") >= 2
    assert newest_whole(small_disk / "run") == 2
    # What cannot be written is said before anything is computed.
    program = [sys.executable, "pretrain_pangu_pro.py", *map(str, argv)]
    again = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "--save" in again.stderr and "Read-only" in again.stderr
    metrics = tmp_path / "metrics.jsonl"
    reading = dict(load=small_disk / "run", save_interval=None, metrics_file=metrics)
    pool.run(2, fused_run, flags(**RUN | reading), None)
    assert steps_in(metrics)[0]["iteration"] == 3


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def zero(data: bytes, rng: random.Random) -> bytes:
    """A block that never reached the disk."""
    at = rng.randrange(len(data))
    return data[:at] + b"\0" * len(data[at : at + 512]) + data[at + 512 :]


def swap(data: bytes, rng: random.Random) -> bytes:
    """Two pieces of the file exchanged."""
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    size = min(64, b - a, len(data) - b)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


HARMS = (cut, flip, zero, swap)


@pytest.fixture(scope="module")
def two_checkpoints(pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    pool.run(2, fused_run, flags(**RUN | dict(train_iters=2, lr_decay_iters=8, save=folder)), None)
    return folder


def load_iterations(cases: list[str]) -> list[int]:
    """The checkpoint that a run would resume from in each folder; on two ranks."""
    return [load._find(Path(case), None, [])[1] for case in cases]


def test_damaged_checkpoints(pool, two_checkpoints, tmp_path):
    """Any damage to any file of the newest checkpoint makes its predecessor be used."""
    rng, cases = random.Random(SEED), []
    names = sorted(entry.name for entry in checkpoint_dir(two_checkpoints, 2).iterdir())
    assert len(names) == 6
    for number in range(DAMAGES):
        name, harm = names[number % len(names)], rng.choice(HARMS)
        path = checkpoint_dir(two_checkpoints, 2) / name
        data = path.read_bytes()
        harmed = harm(data, rng)
        if harmed != data:
            case = shutil.copytree(two_checkpoints, tmp_path / str(number))
            (checkpoint_dir(case, 2) / name).write_bytes(harmed)
            cases.append(str(case))
    assert len(cases) > DAMAGES / 2
    assert pool.run(2, load_iterations, cases, timeout=600) == [[1] * len(cases)] * 2
    assert latest_iteration(two_checkpoints) == 2
    print(f"{len(cases)} damaged checkpoints recognised")


def test_damaged_datasets(tmp_path):
    """Files of up to 16 MiB are compared byte for byte at open, longer ones by --verify."""
    prefix = tmp_path / "data"
    source = corpora.write_jsonl(tmp_path / "text.jsonl", corpora.documents(150))
    command = [sys.executable, "tools/preprocess_data.py", "--input", source, "--output-prefix", prefix]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    command += [corpora.train_tokenizer(tmp_path), "--workers", "1"]
    subprocess.run(list(map(str, command)), cwd=REPOSITORY, check=True, capture_output=True)
    prefix = tmp_path / "data_text_document"
    check_dataset(prefix)
    rng, refused = random.Random(SEED), 0
    for number in range(DAMAGES):
        path = prefix.with_suffix((".bin", ".idx")[number % 2])
        data = path.read_bytes()
        path.write_bytes(harmed := rng.choice(HARMS)(data, rng))
        for check in (check_dataset, _verify):
            with contextlib.nullcontext() if harmed == data else pytest.raises(DatasetError, match=path.name):
                check(prefix)
        refused += harmed != data
        path.write_bytes(data)
    assert refused > DAMAGES / 2
    print(f"{refused} damaged datasets refused")


def _verify(prefix) -> None:
    """As ``tools/inspect_dataset.py --verify``, on a manifest without the digest of pieces."""
    path = prefix.with_suffix(".json")
    text = path.read_text()
    manifest = json.loads(text)
    for facts in manifest["files"].values():
        del facts["pieces_sha256"]
    path.write_text(json.dumps(manifest))
    try:
        found, index = report(prefix)
        verify(prefix, index, found, None)
    finally:
        path.write_text(text)
