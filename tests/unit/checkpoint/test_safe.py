"""No code in a checkpoint's pickles is executed."""

import io
import pickle
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import CheckpointError, checkpoint_dir, load_checkpoint
from megatron_ext.checkpoint.content import plain
from megatron_ext.checkpoint.extra_state import without_code
from megatron_ext.checkpoint.integrity import CHECKSUMS
from megatron_ext.checkpoint.safe import load_metadata, load_object
from tests.helpers.parallel import Layout
from tests.unit.checkpoint.tiny import Run, arguments


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def evil_pickle(trace: Path) -> bytes:
    return pickle.dumps(Evil(trace))


def evil_torch_save(trace: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Evil(trace), buffer)
    return buffer.getvalue()


def in_zip(original: bytes, pickled: bytes) -> bytes:
    """The archive of torch.save with its pickle replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(original)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


def plant(folder: Path, name: str, trace: Path, plain: bool) -> None:
    """Put a pickle that executes code into one file of a checkpoint without checksums."""
    path = folder / name
    original = path.read_bytes()
    if name != "__0_0.distcp":
        path.write_bytes(evil_pickle(trace) if plain else evil_torch_save(trace))
        return
    metadata = load_metadata(folder)
    with open(path, "r+b") as stream:
        for place in metadata.storage_data.values():
            payload = evil_pickle(trace) if plain else evil_torch_save(trace)
            payload = payload[: place.length].ljust(place.length, b"\0")
            stream.seek(place.offset)
            stream.write(payload)
    assert path.stat().st_size == len(original)


@pytest.mark.parametrize("plain", [True, False], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "metadata.json"])
def test_planted_pickles_do_not_run(saved, tmp_path, name, plain):
    folder, trace = checkpoint_dir(saved, 2), tmp_path / "trace"
    (folder / CHECKSUMS).unlink()  # an attacker would make them fit
    shutil.rmtree(checkpoint_dir(saved, 1))
    plant(folder, name, trace, plain)
    with pytest.raises(CheckpointError):
        load_checkpoint(saved, **Run(arguments(Layout())).parts)
    assert not trace.exists()


def test_pickle_inside_the_archive_of_common_pt_does_not_run(saved, tmp_path):
    folder, trace = checkpoint_dir(saved, 2), tmp_path / "trace"
    path = folder / "common.pt"
    path.write_bytes(in_zip(path.read_bytes(), evil_pickle(trace)))
    (folder / CHECKSUMS).unlink()
    shutil.rmtree(checkpoint_dir(saved, 1))
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        load_checkpoint(saved, **Run(arguments(Layout())).parts)
    assert not trace.exists()


def test_the_planted_pickle_would_run(tmp_path):
    pickle.loads(evil_pickle(tmp_path / "trace"))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("place", ["../elsewhere.distcp", "/etc/passwd"])
def test_metadata_cannot_name_files_elsewhere(saved, place):
    folder = checkpoint_dir(saved, 2)
    metadata = load_metadata(folder)
    next(iter(metadata.storage_data.values())).relative_path = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="same folder"):
        load_metadata(folder)


def test_metadata_cannot_ask_for_gigabytes_of_memory(saved):
    """Store an object under the number 2^30 - 1: the unpickler would allocate a table of 16 GiB."""
    path = checkpoint_dir(saved, 2) / ".metadata"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"r" + (2**30 - 1).to_bytes(4, "little") + whole[-1:])
    with pytest.raises(CheckpointError, match="numbers an object 1073741823"):
        load_metadata(path.parent)


def test_a_signal_as_each_python_pickles_it(tmp_path):
    """Megatron-LM's args hold --exit-signal, which Python 3.10 pickles as a name of the module signal."""
    empty = io.BytesIO()
    torch.save({}, empty)
    for pickled in (b"\x80\x02csignal\nSIGTERM\n.", b"\x80\x02csignal\nSignals\nK\x0f\x85R."):
        path = tmp_path / "common.pt"
        path.write_bytes(in_zip(empty.getvalue(), pickled))
        assert load_object(path) is signal.SIGTERM
    assert plain(signal.SIGUSR1) == "SIGUSR1"


def test_fp8_state_is_not_unpickled_where_no_engine_reads_it():
    """Its bytes may contain any code; with Transformer Engine see tests/te/cases/test_extra_state.py."""
    data = torch.frombuffer(bytearray(b"cos\nabort\n(tR."), dtype=torch.uint8)
    assert without_code("decoder._extra_state/shard_0_1", [data, None]) == [None, None]
