"""Errors of tools/inherit_checkpoint.py: exit code 1, a reason that names the input, nothing left behind."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.tokenizer_files import of_path
from tests.unit.inherit.test_inherit import tool
from tests.unit.tokenizer.sample_models import trained

toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """llama/: a folder of another maker's; ours/: a checkpoint with its tokenizer; two tokenizers."""
    base = tmp_path_factory.mktemp("whole")
    toys.folder(base / "llama", "llama", 2, False)
    (base / "small.model").write_bytes(trained(vocab_size=500))
    (base / "other.model").write_bytes(trained(vocab_size=800))
    tokenizer = of_path(base / "small.model")
    toys.checkpoint(base / "ours", toys.pi_model(vocab_size=500, padded_vocab_size=512), tokenizer)
    return base


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(whole, tmp_path / "in")


def weights(folder: Path) -> Path:
    """The file of the other maker's folder."""
    return folder / "llama" / "model.safetensors"


def truncate(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-100])


def header_of(file: Path) -> tuple[dict, bytes]:
    """The header and the data after it."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def change_header(folder: Path, **changes) -> None:
    """Describe the tensor NORM differently from the content of the file."""
    header, data = header_of(weights(folder))
    header[NORM] |= changes
    text = json.dumps(header).encode()
    weights(folder).write_bytes(struct.pack("<Q", len(text)) + text + data)


def point_outside(folder: Path) -> None:
    _, data = header_of(weights(folder))
    change_header(folder, data_offsets=[len(data), len(data) + 256])


def overlap(folder: Path) -> None:
    change_header(folder, data_offsets=[0, 256])


def announce_a_huge_header(folder: Path) -> None:
    content = weights(folder).read_bytes()
    weights(folder).write_bytes(struct.pack("<Q", 1 << 62) + content[8:])


def name_another_type(folder: Path) -> None:
    change_header(folder, dtype="I32")


def name_another_size(folder: Path) -> None:
    change_header(folder, shape=[8, 8])


def replace_tensor(folder: Path, tensor: torch.Tensor) -> None:
    tensors = load_file(weights(folder))
    save_file(tensors | {NORM: tensor}, weights(folder), metadata={"format": "pt"})


def break_a_number(folder: Path) -> None:
    replace_tensor(folder, torch.full((64,), float("nan")))


def configure(folder: Path, **changes) -> None:
    path = folder / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def call_it_gpt2(folder: Path) -> None:
    configure(folder, model_type="gpt2")


def pickle_of(folder: Path, content: object) -> None:
    """The weights only as pytorch_model.bin."""
    weights(folder).unlink()
    torch.save(content, folder / "llama" / "pytorch_model.bin")


def pickle_weights(folder: Path) -> None:
    pickle_of(folder, load_file(weights(folder)))


class _Harmful:
    def __reduce__(self):
        return print, ("it ran",)


def pickle_a_call(folder: Path) -> None:
    pickle_of(folder, {NORM: _Harmful()})


def alter_checkpoint(folder: Path) -> None:
    file = next((folder / "ours").glob("iter_*/*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def nothing(folder: Path) -> None:
    pass


REFUSED = [
    (truncate, "llama", "", "model.safetensors is truncated, or is not a safetensors file"),
    (point_outside, "llama", "", "model.safetensors is truncated, or is not a safetensors file"),
    (overlap, "llama", "", "model.safetensors is truncated, or is not a safetensors file"),
    (announce_a_huge_header, "llama", "", "model.safetensors is truncated, or is not a safetensors file"),
    (name_another_type, "llama", "", "model.norm.weight is quantised or not a number"),
    (name_another_size, "llama", "", "model.norm.weight is [8, 8], config.json says [64]"),
    (break_a_number, "llama", "", "decoder.final_layernorm.weight holds NaN or Inf"),
    (call_it_gpt2, "llama", "", "unknown architecture 'gpt2'; known are llama"),
    (pickle_weights, "llama", "", "as a pickle (pytorch_model.bin)"),
    (pickle_a_call, "llama", "--allow-pickle", "pytorch_model.bin cannot be read as plain tensors"),
    (alter_checkpoint, "ours", "", "was altered"),
    (nothing, "ours", "--tokenizer-model other.model", "is not the tokenizer that"),
    (nothing, "llama", "--tokenizer-model other.model", "it belongs to another model"),
    (nothing, "llama", "--target-tokenizer-model other.model", "does not say where its tokenizer is"),
    (nothing, "llama", "--target-num-layers 3", "the source has only 2; a target is never larger"),
    (nothing, "llama", "--target-ffn-hidden-size 97", "the source has only 96"),
    (nothing, "llama", "--target-num-query-groups 4", "the source has only 2"),
    (nothing, "llama", "--model-preset tiny --target-hidden-size 64", "heads of 32 channels, but the source"),
    (nothing, "llama", "--target-num-attention-heads 3", "3 heads in 2 query groups"),
    (nothing, "absent", "", "there is no such folder"),
]


@pytest.mark.parametrize(
    ("spoil", "load", "flags", "says"), REFUSED, ids=[f"{r[0].__name__} {r[2]}".strip() for r in REFUSED]
)
def test_refused(folder, capfd, spoil, load, flags, says):
    spoil(folder)
    words = [folder / word if word.endswith(".model") else word for word in flags.split()]
    before = sorted(folder.rglob("*"))
    save = folder.parent / "out"
    assert tool(["--load", folder / load, "--save", save, *words]) == 1
    out, err = capfd.readouterr()
    assert says in err and err.startswith("inherit_checkpoint.py: error: ") and "Traceback" not in err
    assert "it ran" not in out
    assert not save.exists() and sorted(folder.rglob("*")) == before


def test_a_pickle_that_is_allowed_is_read(folder):
    cut = ["--target-hidden-size", 48, "--target-num-layers", 1]
    assert tool(["--load", folder / "llama", "--save", folder / "one", *cut]) == 0
    pickle_weights(folder)
    assert tool(["--load", folder / "llama", "--save", folder / "two", *cut, "--allow-pickle"]) == 0
    one, two = open_source(folder / "one"), open_source(folder / "two")
    assert all(torch.equal(one.get(key), two.get(key)) for key in one.keys())  # noqa: SIM118 (not a dict)
