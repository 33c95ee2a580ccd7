"""Stored targets: what comes back, how exact and how large it is, kills, damage, and other targets."""

import dataclasses
import json
import subprocess

import numpy as np
import pytest
import torch

from megatron_ext.data.indexed import DatasetError
from megatron_ext.data.rounds.dataset import NumberedDataset
from megatron_ext.data.teacher_store import (
    TargetFormat,
    Targets,
    TargetStore,
    TargetWriter,
    TaughtSamples,
    open_recording,
    packed,
)
from megatron_ext.data.trace_sample import trace_sample

SAMPLES = 6
SMALL = TargetFormat(seq_length=8, top_k=4, vocab_size=1000)
DATASET = {
    "sources": ["text"], "fingerprints": ["abc"], "weights": None, "documents": [0, 1], "seq_length": 8,
    "seed": 1, "tokenizer_sha256": "t", "samples": SAMPLES, "probe": "p",
}  # fmt: skip


def manifest(**changes) -> dict:
    return {
        "samples": SAMPLES,
        "dataset": DATASET,
        "teacher": {"sha256": "w", "tokenizer_sha256": "big"},
        "reading": {"reset_position_ids": False},
        "temperature": 1.0,
    } | changes


def drawn(like: TargetFormat, samples: int, seed: int = 0) -> Targets:
    """Targets as a teacher gives them: distinct ids, falling probabilities."""
    generator = torch.Generator().manual_seed(seed)
    shape = samples, like.seq_length
    logits = 4 * torch.randn(*shape, like.vocab_size, generator=generator)
    logprobs, ids = logits.log_softmax(-1).topk(like.top_k)
    mask = torch.rand(shape, generator=generator) > 0.2
    return Targets.of(ids, logprobs, 1 - logprobs.exp().sum(-1), mask)


def record(path, like: TargetFormat = SMALL, targets: Targets | None = None, upto: int = SAMPLES) -> None:
    """Records what is missing, two samples at a time, up to ``upto``."""
    targets = targets or drawn(like, SAMPLES)
    opened = open_recording(path, manifest(), like)
    writer = TargetWriter(path, opened)
    for begin in range(opened["recorded"], upto, 2):
        numbers = np.arange(begin, begin + 2)
        part = Targets(*(each[begin : begin + 2] for each in targets))
        writer.write(numbers[::-1], packed(part, like)[::-1])
        writer.mark(begin + 2, force=True)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
def test_targets_come_back(tmp_path, vocab_size, dtype):
    like = TargetFormat(8, 4, vocab_size, dtype)
    targets = drawn(like, SAMPLES)
    targets.ids[0][targets.rest[0] >= 0, 0] = vocab_size - 1
    targets.ids[1, :, 3:], targets.logprobs[1, :, 3:] = -1, -torch.inf
    record(tmp_path / "store", like, targets)
    store = TargetStore.open(tmp_path / "store.npy")
    assert len(store) == SAMPLES and (targets.rest < 0).any()
    for number in range(SAMPLES):
        ids, logprobs, rest = store[number]
        assert torch.equal(ids, targets.ids[number]) and torch.equal(rest, targets.rest[number])
        kept = targets.logprobs[number].to({"fp16": torch.float16, "fp32": torch.float32}[dtype])
        assert torch.equal(logprobs, kept)


@pytest.mark.parametrize(("vocab_size", "expected"), [(48000, 132), (151936, 196)])
def test_bytes_of_a_token(vocab_size, expected):
    like = TargetFormat(4096, 32, vocab_size)
    assert expected <= like.bytes_per_token < expected + 0.01


def test_half_precision_changes_a_loss_by_less_than_a_thousandth():
    """The divergence of random students from teachers of all temperatures, with and without the rounding."""
    for sharpness in (0.5, 2.0, 6.0, 12.0):
        generator = torch.Generator().manual_seed(int(10 * sharpness))
        teacher, student = (torch.randn(500, 4000, generator=generator, dtype=torch.float64) for _ in "ts")
        logprobs, ids = (sharpness * teacher).log_softmax(-1).topk(32)
        rest = 1 - logprobs.exp().sum(-1)
        q = (sharpness * (0.7 * teacher + 0.7 * student)).log_softmax(-1)
        ours, other = q.gather(-1, ids), (1 - q.gather(-1, ids).exp().sum(-1)).log()

        def divergence(logprobs, rest=rest, ours=ours, other=other):
            return (logprobs.exp() * (logprobs - ours)).sum(-1) + torch.xlogy(rest, rest) - rest * other

        stored = logprobs.half().double()
        assert (divergence(stored) - divergence(logprobs)).abs().mean() < 1e-3


def test_killed_and_resumed_gives_the_same_bytes(tmp_path):
    record(tmp_path / "whole")
    record(tmp_path / "killed", upto=2)
    with open(tmp_path / "killed.npy", "r+b") as file:  # written, but not yet noted in the manifest
        file.seek(-2 * SMALL.record.itemsize, 2)
        file.write(b"\xff" * 200)
    with pytest.raises(DatasetError, match="not complete, 2 of 6 samples; start the command"):
        TargetStore.open(tmp_path / "killed")
    record(tmp_path / "killed")
    for name in ("npy", "json"):
        assert (tmp_path / f"whole.{name}").read_bytes() == (tmp_path / f"killed.{name}").read_bytes()


def test_a_full_disk_is_an_error_and_the_recording_goes_on(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    like = dataclasses.replace(SMALL, seq_length=1200)  # records of 24 kB
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            record(place / "store", like)
        assert json.loads((place / "store.json").read_text())["recorded"] == 2
        subprocess.run(["mount", "-o", "remount,size=1m", str(place)], check=True)
        record(place / "store", like)
        record(tmp_path / "store", like)
        assert (place / "store.npy").read_bytes() == (tmp_path / "store.npy").read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_padding_is_not_written(tmp_path):
    record(tmp_path / "store")
    writer = TargetWriter(tmp_path / "store", json.loads((tmp_path / "store.json").read_text()))
    before = (tmp_path / "store.npy").read_bytes()
    writer.write(np.array([SAMPLES, SAMPLES + 1]), packed(drawn(SMALL, 2, seed=1), SMALL))
    writer.mark(SAMPLES, force=True)
    assert (tmp_path / "store.npy").read_bytes() == before


def test_damage_is_found(tmp_path):
    record(tmp_path / "store")
    path = tmp_path / "store.npy"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-3 * SMALL.record.itemsize + 5] ^= 1
    path.write_bytes(damaged)
    store = TargetStore.open(path)
    store[2], store[4]
    with pytest.raises(DatasetError, match=r"store.npy: the record of sample 3 is damaged"):
        store[3]
    path.write_bytes(whole[:-10])
    with pytest.raises(DatasetError, match=r"store.npy: cannot be read as an .npy file"):
        TargetStore.open(path)
    np.save(path, np.zeros(SAMPLES))
    with pytest.raises(DatasetError, match="does not hold what its manifest says"):
        TargetStore.open(path)
    path.unlink()
    with pytest.raises(DatasetError, match="No such file"):
        TargetStore.open(path)


@pytest.mark.parametrize(
    ("changes", "like", "says"),
    [
        ({"dataset": DATASET | {"fingerprints": ["other"]}}, {}, "--data-path: abc there, other here"),
        ({"dataset": DATASET | {"seq_length": 16}}, {"seq_length": 16}, "--seq-length: 8 there, 16 here"),
        ({"dataset": DATASET | {"tokenizer_sha256": "u"}}, {}, "--tokenizer-model: t there, u here"),
        ({"teacher": {"sha256": "v"}}, {}, "the teacher's weights: w there, v here"),
        ({"reading": {"reset_position_ids": True}}, {}, "--reset-position-ids: False there, True here"),
        ({"temperature": 2.0}, {}, "--distillation-temperature: 1.0 there, 2.0 here"),
        ({}, {"top_k": 3}, "--distillation-top-k: 4 there, 3 here"),
        ({}, {"dtype": "fp32"}, "--teacher-logits-dtype: fp16 there, fp32 here"),
    ],
)
def test_other_targets_are_refused(tmp_path, changes, like, says):
    record(tmp_path / "store", upto=2)
    with pytest.raises(DatasetError, match=says):
        open_recording(tmp_path / "store", manifest(**changes), dataclasses.replace(SMALL, **like))
    assert json.loads((tmp_path / "store.json").read_text())["recorded"] == 2


def test_samples_with_their_targets(tmp_path):
    targets = drawn(SMALL, SAMPLES)
    record(tmp_path / "store", targets=targets)
    samples = NumberedDataset([{"tokens": torch.zeros(8)}] * SAMPLES)
    taught = TaughtSamples(samples, TargetStore.open(tmp_path / "store"))
    assert len(taught) == SAMPLES and taught[3]["sample_id"] == 3
    assert torch.equal(taught[3]["teacher_ids"], targets.ids[3])
    assert trace_sample(taught, 4) == {"number": 4}
