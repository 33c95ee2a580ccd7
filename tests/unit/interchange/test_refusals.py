"""What cannot be exchanged is refused, with its reason, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.export import export_folder
from megatron_ext.interchange.hf_config import read_shape
from megatron_ext.interchange.source import open_source
from megatron_ext.interchange.target import write_checkpoint
from megatron_ext.interchange.tokenizer_files import of_path
from tests.unit.tokenizer.sample_models import trained

toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A sharded folder of another maker's."""
    return toys.folder(tmp_path_factory.mktemp("whole") / "llama", "llama", 2, False, shards=True)


@pytest.fixture
def theirs(whole, tmp_path) -> Path:
    """A copy, to be broken."""
    return shutil.copytree(whole, tmp_path / "llama")


def configure(folder: Path, **changes) -> None:
    """Change config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "unknown architecture 'gpt2'; known are llama, mistral"),
        ({"hidden_act": "gelu", "mlp_bias": True}, "hidden_act 'gelu'.*mlp_bias True"),
        ({"attention_bias": True}, "no place for the bias of o_proj"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "type 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "4 heads do not divide into 3 groups"),
        ({"hidden_size": 32}, r"is \[300, 64\], config.json says \[300, 32\]"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.*not part of this architecture"),
        ({"tie_word_embeddings": True}, "ties lm_head.weight to model.embed_tokens.weight, but they differ"),
    ],
)
def test_configurations(theirs, changes, message):
    configure(theirs, **changes)
    with pytest.raises(InterchangeError, match=message):
        open_source(theirs)


def test_sliding_window_limits_the_positions():
    config = json.loads((Path(__file__).parent / "mistral_config.json").read_text())
    assert read_shape(config).max_position_embeddings == 4096
    assert read_shape(config | {"sliding_window": None}).max_position_embeddings == 32768


def test_truncated_safetensors(theirs):
    file = sorted(theirs.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InterchangeError, match=f"{file.name} is truncated"):
        open_source(theirs)


def test_missing_part(theirs):
    file = sorted(theirs.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(InterchangeError, match=f"{file.name} is missing"):
        open_source(theirs)


def test_parts_that_contradict_the_index(theirs):
    index = theirs / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    files = list(places.values())
    crowded = next(name for name, file in places.items() if files.count(file) > 1)
    places[crowded] = next(file for file in files if file != places[crowded])
    index.write_text(json.dumps(content))
    with pytest.raises(InterchangeError, match=f"(holds|lacks) {crowded}"):
        open_source(theirs)


def test_index_that_leads_elsewhere(theirs):
    index = theirs / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(InterchangeError, match="must lie in the same folder"):
        open_source(theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(tmp_path, value):
    folder = toys.folder(tmp_path / "one", "llama", 2, False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    source = open_source(folder)
    with pytest.raises(InterchangeError, match="decoder.layers.1.*linear_qkv.weight holds NaN or Inf"):
        write_checkpoint(tmp_path / "ours", source.shape, source.get)
    assert not (tmp_path / "ours").exists()


def test_weights_of_integers(tmp_path):
    folder = toys.folder(tmp_path / "one", "llama", 2, False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InterchangeError, match="model.norm.weight is quantised"):
        open_source(folder)


def test_pickle_only_where_allowed(tmp_path):
    folder = toys.folder(tmp_path / "one", "llama", 2, False)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InterchangeError, match=r"as a pickle.*--allow-pickle"):
        open_source(folder)
    source = open_source(folder, allow_pickle=True)
    write_checkpoint(tmp_path / "ours", source.shape, source.get)
    assert toys.same(tmp_path / "ours", toys.folder(tmp_path / "two", "llama", 2, False))


class _Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_pickle_runs_nothing(tmp_path, capsys):
    folder = toys.folder(tmp_path / "one", "llama", 2, False)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(InterchangeError, match="cannot be read as plain tensors"):
        open_source(folder, allow_pickle=True)
    assert "run" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """ours/: a checkpoint with a tokenizer; hf/: its folder; small.model, other.model: tokenizers."""
    base = tmp_path_factory.mktemp("exported")
    (base / "small.model").write_bytes(trained())
    (base / "other.model").write_bytes(trained(vocab_size=800))
    shape = toys.pi_shape(vocab_size=of_path(base / "small.model").size, padded_vocab_size=1024)
    toys.checkpoint(base / "ours", shape, of_path(base / "small.model"))
    source = open_source(base / "ours")
    export_folder(base / "hf", source.shape, source.get, tokenizer=source.tokenizer)
    return base


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
def test_altered_export(exported, tmp_path, name):
    folder = shutil.copytree(exported / "hf", tmp_path / "hf")
    data = bytearray((folder / name).read_bytes())
    data[-20] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(InterchangeError, match=f"{name} was altered"):
        open_source(folder)


def test_altered_checkpoint(exported, tmp_path):
    folder = shutil.copytree(exported / "ours", tmp_path / "ours")
    file = next(folder.glob("iter_*/*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InterchangeError, match="was altered"):
        open_source(folder)


@pytest.mark.parametrize("side", ["ours", "hf"])
def test_another_tokenizer(exported, side):
    assert open_source(exported / side, tokenizer_model=exported / "small.model").tokenizer.size == 900
    with pytest.raises(InterchangeError, match="ids mean other pieces"):
        open_source(exported / side, tokenizer_model=exported / "other.model")


def test_tokenizer_larger_than_the_model(theirs, exported):
    with pytest.raises(InterchangeError, match="belongs to another model"):
        open_source(theirs, tokenizer_model=exported / "small.model")


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(InterchangeError, match="there is no such folder"):
        open_source(tmp_path / "nothing")
    with pytest.raises(InterchangeError, match="neither a Hugging Face folder"):
        open_source(tmp_path)


def test_taken_targets(exported, theirs):
    source = open_source(theirs)
    with pytest.raises(InterchangeError, match="holds checkpoints already"):
        write_checkpoint(exported / "ours", source.shape, source.get)
    with pytest.raises(InterchangeError, match="is taken"):
        export_folder(exported / "hf", source.shape, source.get)


def test_tensors_that_are_not_the_models(tmp_path):
    shape = toys.pi_shape()
    get = toys.random_tensors(shape)
    pairs = [(name, get(name)) for name in shape.parameters()]
    for wrong, message in (
        (pairs[:-1], "did not come: output_layer.weight"),
        ([*pairs, pairs[0]], "came twice"),
        ([(pairs[0][0], pairs[0][1][:, 1:]), *pairs[1:]], "it must be"),
    ):
        with pytest.raises(InterchangeError, match=message):
            write_checkpoint(tmp_path / "ours", shape, iter(wrong))
        assert not (tmp_path / "ours").exists()
