"""Llama 3's rotary scaling: the same logits beyond its boundaries, in and out and through a slice."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ext.arguments.of_checkpoint import arguments_of
from megatron_ext.checkpoint import load_checkpoint, read_checkpoint_args
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.export import export_folder
from megatron_ext.interchange.hf_config import read_model, write_config
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.target import write_checkpoint
from megatron_ext.models.builder import build_model
from megatron_ext.models.config import transformer_config

toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")
transformers = toys.transformers
POSITIONS = 8448
SCALED = {"use_rope_scaling": True, "rope_scaling_factor": 8.0}
#: With 16 channels a head and base 10000 the wavelengths are 6 to 1987, which stay, 6283, which is between
#: the boundaries 2048 and 8192, and 19869, which is stretched by the whole factor.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> Path:
    """theirs/: a toy Llama with scaled rotary embeddings; ours/: its checkpoint."""
    base = tmp_path_factory.mktemp("llama3")
    built = toys.model(
        "llama", 2, False, max_position_embeddings=POSITIONS, rope_parameters=LLAMA3 | {"rope_theta": 1e4}
    )
    built.save_pretrained(base / "theirs")
    source = open_source(base / "theirs")
    write_checkpoint(base / "ours", source.model, source.dtype, source.get)
    return base


def in_transformers(folder: Path, **changes) -> torch.Tensor:
    """The logits of a folder's model on IDS."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, trust_remote_code=True, **changes).eval()(IDS).logits


def ours(load: Path) -> torch.Tensor:
    """The logits of a checkpoint's model on IDS."""
    run = arguments_of(read_checkpoint_args(load), load)
    model = build_model(transformer_config(run), run)
    assert load_checkpoint(load, model=model, run=run) is not None
    return model[0].eval()(IDS, torch.arange(POSITIONS)[None], None)[..., : toys.VOCABULARY]


IDS = torch.randint(0, toys.VOCABULARY, (1, POSITIONS), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_beyond_the_boundaries_and_way_back(single_process, llama3, tmp_path):
    source = open_source(llama3 / "ours")
    assert source.model.rope_scaling_factor == 32.0
    theirs, found = in_transformers(llama3 / "theirs"), ours(llama3 / "ours")
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
    plain = in_transformers(llama3 / "theirs", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    for stretch in (slice(512, 2048), slice(2048, 8192), slice(8192, None)):
        assert (plain - theirs)[:, stretch].abs().max() > 0.01, "the scaling must matter here"

    out = export_folder(tmp_path / "back", source.model, source.dtype, source.get)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"] == LLAMA3 | {"rope_theta": 1e4} and config["rope_scaling"] == LLAMA3
    assert toys.same(llama3 / "theirs", out)
    assert torch.equal(in_transformers(out), theirs)


@torch.no_grad()
def test_a_pi_model_with_scaling_in_transformers(single_process, tmp_path):
    model = toys.pi_model(max_position_embeddings=POSITIONS, **SCALED)
    load = toys.checkpoint(tmp_path / "ours", model)
    out = export_folder(tmp_path / "hf", model, torch.float32, open_source(load).get)
    torch.testing.assert_close(in_transformers(out), ours(load), rtol=1e-5, atol=1e-5)


def test_a_slice_keeps_it(llama3, tmp_path):
    from tests.unit.inherit.test_inherit import tool

    argv = ["--load", llama3 / "theirs", "--save", tmp_path / "small", "--target-hidden-size", 48]
    assert tool(argv) == 0
    assert open_source(tmp_path / "small").model.rope_scaling_factor == 32.0


OLD = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
OLD |= {"num_attention_heads": 4, "vocab_size": 300, "rope_theta": 500000.0}


def test_older_spelling():
    assert read_model(OLD | {"rope_scaling": LLAMA3}).rope_scaling_factor == 32.0
    assert not read_model(OLD | {"rope_scaling": None}).use_rope_scaling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_freq_factor": 2.0}, "low_freq_factor 2.0 of llama3's rotary scaling.*only 1"),
        ({"high_freq_factor": 8.0}, "high_freq_factor 8.0 .*only 4"),
        ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings 4096 .*only 8192"),
        ({"factor": None}, "factor None .*not a number"),
        ({"rope_type": "yarn"}, "type 'yarn' are not supported"),
        ({"rope_type": "linear"}, "type 'linear' are not supported"),
    ],
)
def test_other_numbers_and_types(changes, message):
    with pytest.raises(InterchangeError, match=message):
        read_model(OLD | {"rope_scaling": LLAMA3 | changes})


def test_two_settings_that_differ():
    with pytest.raises(InterchangeError, match="rope_parameters and rope_scaling differ: default and llama3"):
        read_model(OLD | {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}})


def test_internlm2_has_no_place_for_it():
    model = toys.pi_model(series_activation_order=0, augmented_shortcuts=0, **SCALED)
    with pytest.raises(InterchangeError, match="InternLM2"):
        write_config(model, torch.float32, "internlm2")
