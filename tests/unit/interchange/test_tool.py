"""tools/convert_checkpoint.py: usage, exit codes, summary, both ways."""

import importlib
import json
import shutil

import pytest

from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.open import open_source
from tests.unit.tokenizer.sample_models import trained

toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")
tool = importlib.import_module("tools.convert_checkpoint")


def run(*words) -> int:
    """The tool's exit code."""
    return tool.main([str(word) for word in words])


def test_there_and_back(tmp_path, capsys):
    folder = toys.folder(tmp_path / "hf", "qwen2", 2, True)
    assert run("--from", "hf", "--to", "megatron", "--load", folder, "--save", tmp_path / "ours") == 0
    assert "Qwen2ForCausalLM" in capsys.readouterr().out
    back = (
        "--from",
        "megatron",
        "--to",
        "hf",
        "--load",
        tmp_path / "ours",
        "--max-shard-size",
        "60KB",
        "--json",
    )
    assert run(*back, "--save", tmp_path / "back") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["parameters"] == sum(t.numel() for t in toys.tensors_of(folder).values())
    assert summary["dtype"] == "float32" and summary["peak_memory_bytes"] > 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert toys.same(folder, tmp_path / "back")


def test_another_number_format(tmp_path):
    toys.checkpoint(tmp_path / "ours", toys.pi_model())
    words = ("--from", "megatron", "--to", "megatron", "--load", tmp_path / "ours", "--dtype", "bf16")
    assert run(*words, "--save", tmp_path / "half") == 0
    full, half = open_source(tmp_path / "ours"), open_source(tmp_path / "half")
    assert half.saved["bf16"]
    for key in full.keys():  # noqa: SIM118 (not a dict)
        assert half.get(key).equal(full.get(key).bfloat16())


def test_bad_input(tmp_path, capsys):
    assert run("--from", "hf", "--to", "megatron", "--load", tmp_path, "--save", tmp_path / "x") == 1
    assert "neither a Hugging Face folder" in capsys.readouterr().err
    toys.checkpoint(tmp_path / "ours", toys.pi_model())
    assert run("--from", "hf", "--to", "hf", "--load", tmp_path / "ours", "--save", tmp_path / "x") == 1
    assert "is a megatron folder" in capsys.readouterr().err
    words = ("--from", "megatron", "--to", "hf", "--load", tmp_path / "ours", "--hf-architecture")
    assert run(*words, "llama", "--save", tmp_path / "x") == 1
    assert "a LlamaForCausalLM has no place for" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_all_usage_problems_at_once(tmp_path, capsys):
    words = ("--from", "megatron", "--to", "megatron", "--load", tmp_path, "--save", tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run(*words, "--allow-pickle", "--hf-architecture", "llama", "--max-shard-size", "1GB")
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    for part in (
        "--allow-pickle needs",
        "--hf-architecture needs",
        "--max-shard-size needs",
        "the same folder",
    ):
        assert part in said


def test_ends_of_text_that_differ(tmp_path, capsys):
    """A folder of chat models often names several, one of which is the tokenizer's; another one is told."""
    (tmp_path / "small.model").write_bytes(trained(vocab_size=500))
    folder = toys.folder(tmp_path / "hf", "llama", 2, False, vocab_size=500)
    shutil.copyfile(tmp_path / "small.model", folder / "tokenizer.model")
    words = ("--from", "hf", "--to", "megatron", "--load", folder, "--save")
    for told, warned in (([7, 2], 0), (7, 1), (None, 0)):
        config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": told}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").unlink(missing_ok=True)
        assert run(*words, tmp_path / f"ours {told}") == 0
        said = capsys.readouterr().err
        assert said.count("config.json ends texts with id 7, the tokenizer with 2") == warned


def test_tensors_that_are_not_where_the_metadata_says(tmp_path):
    toys.checkpoint(tmp_path / "ours", toys.pi_model())
    source = open_source(tmp_path / "ours")
    source._metadata.storage_data.clear()
    with pytest.raises(InterchangeError, match="decoder.final_layernorm.weight cannot be read"):
        source.get("decoder.final_layernorm.weight")
