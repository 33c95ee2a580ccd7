"""Broken input of every kind: an error or a right answer, never a crash, a hang or a wrong result.

FUZZ_CASES sets their number over all parsers (``make fuzz`` takes a million), FUZZ_SEED other cases.
"""

import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.checkpoint.metadata import Metadata

from megatron_ext.checkpoint import (
    CheckpointError,
    checkpoint_dir,
    latest_iteration,
)
from megatron_ext.checkpoint.integrity import CHECKSUMS, damage, read_marker
from megatron_ext.checkpoint.safe import load_metadata, load_object
from megatron_ext.data import DatasetError
from megatron_ext.data.indexed import HEADER, check_layout
from megatron_ext.data.manifest import check_dataset
from megatron_ext.data.text.records import BadLine, load_record, texts_of
from megatron_ext.data.writer import publish, write_dataset
from megatron_ext.tokenizer.build import SentencePieceTokenizer, TokenizerError
from megatron_ext.tokenizer.encoder import NativeEncoder
from tests.fuzz.mutate import mutate, survive
from tests.unit.checkpoint.conftest import saved, saved_once  # noqa: F401 (fixtures)
from tests.unit.data import corpora

CASES = int(os.environ.get("FUZZ_CASES", 10_000))
SEED = os.environ.get("FUZZ_SEED", "0")
SHARES = {"jsonl": 0.4, "idx": 0.25, "manifest": 0.15, "checkpoint": 0.12, "tokenizer": 0.08}
MARKS = (
    b'"text"',
    b"{",
    b"}",
    b"[",
    b'"',
    b"\\u",
    b"\\ud83d",
    b"\xf0\x9f",
    b"1e999",
    b"NaN",
    b"null",
    b"\x00",
)


#: What hostile pickles and archives are made of: names, halves that are shared, depth, large numbers.
PICKLE_MARKS = (
    *(b"cposix\nsystem\n", b"\x80\x04", b"../", b"\x85" * 1000, b"2\x86" * 60, b"2\x86" * 60 + b"K\x01s"),
    *(b"]q\x00h\x00a", b"r\xff\xff\xff\x7f", b"\x8a\xff" + b"\x7f" * 255, b"PK\x05\x06", b"PK\x06\x07"),
)


def fuzz(parser: str, case) -> None:
    """Run the parser's share of the cases; some have to be refused, and for most parsers some accepted."""
    outcomes = survive(round(CASES * SHARES[parser]), f"{SEED} {parser}", case)
    print(f"{parser}: {outcomes}")
    assert outcomes.get("refused", 0) > 0


def test_jsonl():
    lines = [
        json.dumps({"id": 3, "text": text, "more": [1, {"a": None}]}, ensure_ascii=bool(i % 2)).encode()
        for i, text in enumerate(filter(None, corpora.documents(40)))
    ]

    def case(rng: random.Random) -> str:
        line = mutate(rng.choice(lines), rng, MARKS)
        try:
            found = [texts_of(load_record(line), "text")]
        except BadLine:
            found = None
        assert found == _text_by_json(line), line
        return "refused" if found is None else "read"

    fuzz("jsonl", case)


def _text_by_json(line: bytes) -> list[list[bytes]] | None:
    """What Python's own parser says of a line."""
    try:
        value = json.loads(line.decode("utf-8"))["text"]
        parts = value if isinstance(value, list) else [value]
        return [[part.encode("utf-8") for part in parts]]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A dataset of 30 documents with a manifest."""
    lengths = np.array([7 * i % 23 for i in range(30)], dtype=np.int32)
    ids = np.arange(lengths.sum(), dtype=np.uint16)
    written = write_dataset(tmp_path / "data", [ids.tobytes()], np.uint16, lengths, np.arange(31))
    publish(written, {"dtype": "uint16", "tokenizer": {"sha256": "0" * 64, "name": "x", "vocab_size": 9}})
    return tmp_path / "data"


def test_idx(dataset):
    """An index that is accepted says of the bytes what an independent reading of them says."""
    path = Path(f"{dataset}.idx")
    original, size = path.read_bytes(), Path(f"{dataset}.bin").stat().st_size

    def case(rng: random.Random) -> str:
        data = mutate(original, rng, (b"MMIDIDX\x00\x00", struct.pack("<Q", 30), original[:34]))
        path.write_bytes(data)
        try:
            index = check_layout(dataset)
        except DatasetError as error:
            assert str(dataset) in str(error)
            return "refused"
        _, version, _, sequences, bounds = HEADER.unpack(data[: HEADER.size])
        lengths = struct.unpack(f"<{sequences}i", data[HEADER.size : HEADER.size + 4 * sequences])
        assert version == 1 and list(index.lengths) == list(lengths) and min(lengths, default=0) >= 0
        assert sum(lengths) * index.dtype.itemsize == size
        assert len(index.documents) == bounds and index.documents[-1] == sequences
        return "read"

    fuzz("idx", case)


def test_manifest(dataset):
    """With a manifest that was altered: an error that names it, or the dataset as it is."""
    path = Path(f"{dataset}.json")
    original = path.read_bytes()
    values = [None, True, -1, 2**70, "x", "../../etc/passwd", [], {}, [{}], {"../x": {"bytes": 1}}, 0.5]

    def case(rng: random.Random) -> str:
        if rng.random() < 0.5:
            path.write_bytes(mutate(original, rng, MARKS))
        else:
            _put(manifest := json.loads(original), rng.choice(values), rng)
            path.write_text(json.dumps(manifest))
        try:
            index = check_dataset(dataset)
        except DatasetError as error:
            assert str(dataset) in str(error)
            return "refused"
        assert len(index.documents) == 31 and index.num_tokens == int(index.lengths.sum())
        return "read"

    fuzz("manifest", case)


def _put(node, value, rng: random.Random) -> None:
    """Replace a random entry of nested dicts and lists."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        node[key] = value
        return


def test_checkpoint(saved):  # noqa: F811
    """With its checksums every change is seen; without, no file is opened that lies elsewhere."""
    folder = checkpoint_dir(saved, 2)
    names = (".metadata", "common.pt", "metadata.json", CHECKSUMS, "__0_0.distcp")
    original = {name: (folder / name).read_bytes() for name in names}
    marker = read_marker(folder)
    small = {name: data for name, data in original.items() if len(data) < 1 << 20}

    def case(rng: random.Random) -> str:
        name = rng.choice(list(small))
        data = mutate(small[name], rng, PICKLE_MARKS + (small[".metadata"][:200],))
        (folder / name).write_bytes(data)
        try:
            # A key written twice, or another blank, changes nothing that checksums.json says.
            unchanged = data == original[name] or (name == CHECKSUMS and _marker(folder) == marker)
            assert (damage(folder) is None) == unchanged, name
            return _read_altered(folder, name)
        finally:
            (folder / name).write_bytes(original[name])

    fuzz("checkpoint", case)
    tracker = saved / "latest_checkpointed_iteration.txt"
    for number in range(200):
        tracker.write_bytes(mutate(b"2", random.Random(number), (b"release", b"\xff", b"9" * 30)))
        assert latest_iteration(saved) is None or latest_iteration(saved) >= 0


def _marker(folder: Path) -> dict | None:
    try:
        return read_marker(folder)
    except CheckpointError:
        return None


def _read_altered(folder: Path, name: str) -> str:
    """Read the altered file as if its checksum had been made to fit."""
    try:
        if name == ".metadata":
            metadata = load_metadata(folder)
            assert isinstance(metadata, Metadata)
            assert all("/" not in str(place.relative_path) for place in metadata.storage_data.values())
        elif name == "common.pt":
            load_object(folder / name)
        elif name == CHECKSUMS:
            assert all("/" not in file for file in read_marker(folder))
        else:
            return "refused"
    except CheckpointError as error:
        assert name in str(error)
        return "refused"
    return "read"


def test_tokenizer(tmp_path):
    """A model that is read encodes, natively, to the ids of sentencepiece itself."""
    model = corpora.train_tokenizer(tmp_path)
    original, path = model.read_bytes(), tmp_path / "broken.model"
    texts = [text for text in corpora.documents(3, seed=5) if text] + ["x" * 300, "\u2581 \u4e2d\U0001f642"]

    def case(rng: random.Random) -> str:
        path.write_bytes(mutate(original, rng, (b"\x0a\xff\xff\xff\xff\x0f", b"\x12\x02", original[:64])))
        try:
            SentencePieceTokenizer(path)
            encoder = NativeEncoder(path)
        except (TokenizerError, ValueError) as error:
            assert path.name in str(error)
            return "refused"
        for text in texts:
            assert encoder.encode(text).tolist() == encoder.processor.encode(text), text
        return "read natively" if encoder.native else "read"

    fuzz("tokenizer", case)
