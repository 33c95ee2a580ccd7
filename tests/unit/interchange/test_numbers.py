"""Another number format keeps what the tensors say, or nothing is written."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.interchange import export
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.hf_config import write_config
from megatron_ext.interchange.numbers import to_format
from megatron_ext.interchange.open import open_source

toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")
tool = pytest.importorskip("tools.convert_checkpoint")


def run(*words) -> int:
    """The tool's exit code."""
    return tool.main([str(word) for word in words])


@pytest.fixture
def folder(tmp_path):
    """A model in bf16 with one weight that fp16 has no number for."""
    path = toys.folder(tmp_path / "model", "llama", 2, False)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path / "model.safetensors").items()}
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = -1e5
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("target", ["megatron", "hf"])
def test_overflow_in_both_directions(folder, tmp_path, capsys, target):
    shutil.copytree(folder, tmp_path / "load")
    source, load = "hf", tmp_path / "load"
    if target == "hf":
        assert run("--from", "hf", "--to", "megatron", "--load", folder, "--save", tmp_path / "ours") == 0
        source, load = "megatron", tmp_path / "ours"
    words = ("--from", source, "--to", target, "--load", load, "--save", tmp_path / "half")
    assert run(*words, "--dtype", "fp16") == 1
    told = capsys.readouterr().err
    assert "decoder.layers.1.mlp.linear_fc2.weight does not fit float16: its largest value is 99840" in told
    assert not (tmp_path / "half").exists()


def test_what_would_be_rounded_away():
    weights = torch.full((4, 4), 3e-8)
    with pytest.raises(InterchangeError, match="x is too small for float16: .* its largest value is 3e-08"):
        to_format("x", weights, torch.float16)
    with pytest.raises(InterchangeError, match="x does not fit bfloat16: its largest value is 3.4"):
        to_format("x", torch.tensor([3.4e38]), torch.bfloat16)
    weights[0, 0] = 1.0  # some small ones among others are rounding
    assert to_format("x", weights, torch.float16)[1, 1] == torch.tensor(3e-8).half()
    assert to_format("x", weights.bfloat16(), torch.float32).dtype == torch.float32
    assert to_format("x", torch.zeros(3), torch.float16).eq(0).all()


def test_half_precision_is_said_in_the_args(tmp_path):
    path = toys.folder(tmp_path / "model", "llama", 2, False)
    words = ("--from", "hf", "--to", "megatron", "--load", path, "--save", tmp_path / "half")
    assert run(*words, "--dtype", "fp16") == 0
    source = open_source(tmp_path / "half")
    assert source.saved["fp16"] and source.saved["params_dtype"] == source.dtype == torch.float16


def test_buffers_do_not_widen_a_model(tmp_path):
    """Old exports carry the rotary frequencies along, in fp32."""
    path = toys.folder(tmp_path / "model", "llama", 2, False)
    tensors = {name: tensor.half() for name, tensor in load_file(path / "model.safetensors").items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path / "model.safetensors")
    assert open_source(path).dtype == torch.float16


def test_checkpoint_that_mixes_formats(tmp_path):
    """The widest counts, wherever it stands."""
    toys.checkpoint(tmp_path / "ours", toys.pi_model(), dtype=torch.bfloat16)
    source = open_source(tmp_path / "ours")
    assert source.dtype == torch.bfloat16
    entry = source._metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    entry.properties.dtype = torch.float32
    assert source._find_dtype() == torch.float32
    entry.properties.dtype = torch.int8
    with pytest.raises(InterchangeError, match="int8; only fp32, fp16 and bf16"):
        source._find_dtype()


def test_checkpoint_with_other_layers_than_its_args_say(tmp_path):
    toys.checkpoint(tmp_path / "ours", toys.pi_model())
    source = open_source(tmp_path / "ours")
    for told in (1, 3, 10**9):
        with pytest.raises(InterchangeError, match=f"holds 2 layers, but its args say {told}"):
            source._require_layers(told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": "2"}, "--num-layers '2': must be an integer"),
        ({"num_layers": None, "kv_channels": None}, "nothing says num_layers, kv_channels"),
        ({"hidden_size": 10**12}, "--hidden-size 1000000000000: no model is as large"),
        ({"num_attention_heads": 10**40}, "--num-attention-heads 1.*: must be an integer"),
        ({"untie_embeddings_and_output_weights": 1}, "--untie-.*-weights 1: must be true or false"),
        ({"layernorm_epsilon": float("nan")}, "--norm-epsilon nan: must be a number"),
        ({"padded_vocab_size": 299}, "--padded-vocab-size 299: too few rows for a vocabulary of 300"),
    ],
)
def test_values_of_no_model(changes, message):
    with pytest.raises(InterchangeError, match=message):
        toys.pi_model(**changes)


def test_export_is_read_again(tmp_path, monkeypatch):
    """A configuration that says something else, and a file that holds something else."""
    model, dtype = toys.pi_model(), torch.float32
    monkeypatch.setattr(export, "write_config", lambda *words: write_config(*words) | {"rms_norm_eps": 1e-6})
    with pytest.raises(InterchangeError, match="config.json cannot say what.*layernorm_epsilon=1e-06"):
        export.export_folder(tmp_path / "out", model, dtype, toys.random_tensors(model))
    monkeypatch.undo()

    def damaged(tensors, path, metadata):
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata)

    monkeypatch.setattr(export, "save_file", damaged)
    with pytest.raises(InterchangeError, match="does not hold .* as it was written"):
        export.export_folder(tmp_path / "out", model, dtype, toys.random_tensors(model))
    assert not (tmp_path / "out").exists()
