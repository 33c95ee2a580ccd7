"""Malicious bytes never cause a hang, a crash or gigabytes of memory: they are checked first."""

import io
import pickle
import struct
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_ext.checkpoint import (
    CheckpointError,
    checkpoint_dir,
    load_checkpoint,
    read_checkpoint_args,
)
from megatron_ext.checkpoint.bounds import Unbounded, require_bounded
from megatron_ext.checkpoint.integrity import CHECKSUMS, describe_file, marker
from megatron_ext.checkpoint.reader import read
from megatron_ext.checkpoint.safe import load_metadata, load_object
from tests.helpers.parallel import Layout
from tests.unit.checkpoint.tiny import Run, arguments


def shared_halves(levels: int = 60, kind: type = tuple):
    """Tuples that share their halves: small, but 2^60 steps to hash, to compare or to print."""
    made = kind(["x", "y"])
    for _ in range(levels):
        made = kind([made, made])
    return made


def deep(levels: int):
    made = ()
    for _ in range(levels):
        made = (made,)
    return made


def late_bomb() -> bytes:
    """Lists that are filled after they were shared, so that none looks large when it is put into another."""
    words = [b"\x80\x02"]
    for number in range(61):
        words.append(b"]" + b"r" + struct.pack("<I", number))  # an empty list, remembered
    for number in range(60, 0, -1):
        get, put = b"j" + struct.pack("<I", number), b"j" + struct.pack("<I", number - 1)
        words.append(get + put + b"a" + put + b"a")
    return b"".join(words) + b"."


def endless() -> bytes:
    """A list that holds itself."""
    return b"\x80\x02]q\x00h\x00a."


BOMBS = {
    "tuples": pickle.dumps(shared_halves(), 2),
    "tuples, protocol 4": pickle.dumps(shared_halves(), 4),
    "lists": pickle.dumps(shared_halves(kind=list), 2),
    "a key of a dict": b"\x80\x02}" + pickle.dumps(shared_halves(), 2)[2:-1] + b"K\x01s.",
    "tuples in objects": pickle.dumps(MetadataIndex(shared_halves()), 2),
    "filled late": late_bomb(),
    "wide": pickle.dumps([list(range(5000))] * 5000, 2),
    "in itself": endless(),
    "deep": b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "numbered": b"\x80\x02]r" + struct.pack("<I", 2**31) + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_measured(name):
    with pytest.raises(Unbounded):
        require_bounded(BOMBS[name])


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x", b"y"], "b": (1, (2, (3, [4])))},
        Namespace(**{f"name{i}": [i] * 20 for i in range(500)}),
        [("the same words", 1024)] * 3000,
        deep(50),
    ],
)
def test_honest_pickles_pass(value):
    for protocol in (2, 4, 5):
        require_bounded(pickle.dumps(value, protocol))


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"\x80\x02}", b"K\x01K\x02s.", b"h\x05.", b"(.", b"u."])
def test_what_is_no_pickle(data):
    with pytest.raises((ValueError, LookupError)):
        require_bounded(data)


def fit_checksums(folder: Path) -> None:
    files = {p.name: describe_file(p) for p in folder.iterdir() if p.name != CHECKSUMS}
    (folder / CHECKSUMS).write_bytes(marker(2, files))


def archive(data: bytes, method: int = zipfile.ZIP_STORED, more: int = 0, names=("data.pkl",)) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name in names:
            with made.open(name if "/" in name else f"archive/{name}", "w") as record:
                record.write(data)
                for _ in range(more):
                    record.write(bytes(1 << 20))
        made.writestr("archive/version", "3\n")
        made.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def two_ends(first: bytes, second: bytes) -> bytes:
    """Two archives in one file: readers differ in the directory that they find."""
    return first + second


SMALL = b"\x80\x02}."
ARCHIVES = {
    **{f"a bomb of {name}": archive(data) for name, data in BOMBS.items()},
    "deflated": archive(SMALL, zipfile.ZIP_DEFLATED, more=64),
    "no pickle": archive(SMALL, names=("other.pkl",)),
    "two pickles": archive(SMALL, names=("data.pkl", "other/data.pkl")),
    "behind another": two_ends(archive(SMALL), archive(SMALL)),
    "with a comment": archive(SMALL)[:-2] + b"\x04\x00PK\x05\x06",
    "cut": archive(SMALL)[:-5],
    "not an archive": b"PK" * 50,
    "empty": b"",
    "the older form": SMALL,
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_hold_more_than_they_are(tmp_path, name):
    path = tmp_path / "common.pt"
    path.write_bytes(ARCHIVES[name])
    with pytest.raises(CheckpointError, match="common.pt cannot be read safely: "):
        load_object(path)


def test_a_record_that_says_it_is_larger(tmp_path):
    """Sizes in the directory that the file cannot hold."""
    data = bytearray(archive(SMALL))
    at = data.index(b"PK\x01\x02")
    data[at + 20 : at + 28] = struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)
    (tmp_path / "common.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="would unpack to more than"):
        load_object(tmp_path / "common.pt")


def test_a_record_twice(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        data = archive(SMALL, names=("data.pkl", "data.pkl"))
    (tmp_path / "common.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="not those of torch.save"):
        load_object(tmp_path / "common.pt")


@pytest.mark.parametrize("kind", ["tuples", "deep", "a key of a dict"])
@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_checkpoint_with_a_bomb_is_not_used(saved, name, kind):
    folder = checkpoint_dir(saved, 2)
    if name == ".metadata":
        (folder / name).write_bytes(BOMBS[kind])
    elif name == "common.pt":
        (folder / name).write_bytes(archive(BOMBS[kind]))
    else:
        metadata = load_metadata(folder)
        index, place = max(metadata.storage_data.items(), key=lambda item: item[1].length)
        bomb = archive(b"\x80\x02)" + b"\x85" * 200 + b"." if kind == "deep" else BOMBS[kind])
        place.offset, place.length = (folder / name).stat().st_size, len(bomb)
        with open(folder / name, "ab") as file:
            file.write(bomb)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    fit_checksums(folder)
    with pytest.raises(CheckpointError, match=rf"{name}.* (cannot be read safely|over 100 deep)"):
        load_checkpoint(saved, **Run(arguments(Layout())).parts, iteration=2)


def alter_metadata(folder: Path, change) -> None:
    metadata = load_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _larger(metadata) -> None:
    stored = next(m for m in metadata.state_dict_metadata.values() if hasattr(m, "size"))
    stored.size = torch.Size([2**20, 2**20])


def _place(**values):
    def change(metadata) -> None:
        vars(next(iter(metadata.storage_data.values()))).update(values)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _larger,
        _place(relative_path=("a", "b")),
        _place(relative_path="../x"),
        _place(offset=-1),
        _place(length="7"),
        _place(transform_descriptors=["zstd"]),
        lambda metadata: setattr(metadata, "storage_data", [1]),
        lambda metadata: setattr(metadata, "state_dict_metadata", {}),
    ],
)
def test_metadata_that_tells_of_more_than_there_is(saved, change):
    folder = checkpoint_dir(saved, 2)
    alter_metadata(folder, change)
    with pytest.raises(CheckpointError, match=".metadata"):
        read(folder)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 10**9},
        {"hidden_size": 2**24},
        {"ffn_hidden_size": 2**40},
        {"padded_vocab_size": 2**40},
        {"num_attention_heads": 2**20, "kv_channels": 2**10},
        {"series_activation_order": 2**40},
        {"augmented_shortcuts": 2**30},
        {"position_embedding_type": "learned_absolute", "max_position_embeddings": 2**40},
    ],
)
def test_args_of_a_model_that_the_files_cannot_hold(saved, sizes):
    folder = checkpoint_dir(saved, 2)
    common = load_object(folder / "common.pt")
    vars(common["args"]).update(sizes)
    torch.save(common, folder / "common.pt")
    with pytest.raises(CheckpointError, match="describe a model of over .* parameters, and all its files"):
        read_checkpoint_args(saved, 2)


def test_checksums_without_end(saved):
    path = checkpoint_dir(saved, 2) / CHECKSUMS
    with open(path, "r+b") as file:
        file.truncate(1 << 33)  # a sparse file
    with pytest.raises(CheckpointError, match=CHECKSUMS):
        load_checkpoint(saved, **Run(arguments(Layout())).parts, iteration=2)
    path.write_bytes(b"[" * 1_000_000)
    with pytest.raises(CheckpointError, match=CHECKSUMS):
        load_checkpoint(saved, **Run(arguments(Layout())).parts, iteration=2)
