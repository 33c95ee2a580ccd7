"""What cannot be exchanged is refused, with its reason, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint.integrity import CHECKSUMS, describe_file, marker
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.export import export_folder
from megatron_ext.interchange.hf_config import read_model
from megatron_ext.interchange.open import open_source
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
        (
            {"num_key_value_heads": 3},
            "config.json: .*4 is not divisible by --num-query-groups 3",
        ),
        ({"hidden_size": 32}, r"is \[300, 64\], config.json says \[300, 32\]"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.*not part of this architecture"),
        ({"tie_word_embeddings": True}, "ties lm_head.weight to model.embed_tokens.weight, but they differ"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
        ({"rope_theta": 500.0}, "rope_theta is said twice and differs: 500.0 and 5000.0"),
        ({"rope_scaling": {"type": "dynamic", "rope_theta": 1e4}}, "rope_parameters and rope_scaling differ"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"num_hidden_layers": 10**6}, "says 1000000 layers, but the files hold 21 tensors"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, it must be from 1 to"),
        ({"num_attention_heads": 0, "vocab_size": True}, "num_attention_heads is 0.*vocab_size is True"),
        ({"intermediate_size": 10**40, "head_dim": "x"}, "intermediate_size is 10.*head_dim is 'x'"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta nan is not a whole number"),
        ({"rope_parameters": 5}, "rope_parameters or rope_scaling is 5, not an object"),
        ({"rope_parameters": {"full_attention": {}, "rope_type": ["x"]}}, "type .'x'. are not supported"),
        ({"sliding_window": {}}, "sliding_window is {}"),
        ({"layer_types": 5}, "layer_types 5"),
        ({"model_type": "pangu_pi", "series_activation_order": "2"}, "series_activation_order is '2'"),
        ({"model_type": "pangu_pi", "augmented_shortcut_reduction": 0}, "augmented_shortcut_reduction is 0"),
    ],
)
def test_configurations(theirs, changes, message):
    configure(theirs, **changes)
    with pytest.raises(InterchangeError, match=message):
        open_source(theirs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":' + "[" * 5000 + "]" * 5000 + "}", "config.json is nested too deeply"),
        ('{"hidden_size": 64, "hidden_size": 32}', "config.json.*'hidden_size' is said twice"),
        ("[]", "config.json does not hold a JSON object"),
        ("{", "config.json cannot be read as JSON"),
        (f'{{"hidden_size": {"9" * 5000}}}', "config.json cannot be read as JSON"),
    ],
)
def test_config_that_is_no_configuration(theirs, text, message):
    (theirs / "config.json").write_text(text)
    with pytest.raises(InterchangeError, match=message):
        open_source(theirs)


def test_json_beyond_all_sizes(theirs):
    with open(theirs / "tokenizer.json", "wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(
        InterchangeError, match="tokenizer.json cannot be read as JSON: it has more than 64 MiB"
    ):
        open_source(theirs)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens.json": {"a": "x"}, "vocab.json": {}}, "added_tokens.json does not describe"),
        ({"vocab.json": 7}, "vocab.json does not hold a JSON object"),
        ({"vocab.json": {"a": 10**12}}, "vocab.json does not describe a tokenizer: 'a' has id 1000000000000"),
        ({"tokenizer.json": {"model": 5}}, "tokenizer.json does not describe a tokenizer"),
        ({"tokenizer.json": {"model": {"vocab": [7]}}}, "tokenizer.json does not describe a tokenizer"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}}, "tokenizer_config.json does not"),
        (
            {"tokenizer.json": {"model": {"vocab": {"a": 1, "b": 2}}}, "added_tokens.json": {"b": 3}},
            "added_tokens.json: 'b' has id 3, but elsewhere the tokenizer says 2",
        ),
    ],
)
def test_tokenizers_that_are_none(theirs, files, message):
    for name, content in files.items():
        (theirs / name).write_text(json.dumps(content))
    with pytest.raises(InterchangeError, match=message):
        open_source(theirs)


def test_settings_left_out_are_those_of_transformers():
    """Mistral's window is there although its configuration does not say so, as are its 8 groups."""
    config = json.loads((Path(__file__).parent / "mistral_config.json").read_text())
    for name in ("sliding_window", "num_key_value_heads"):
        config.pop(name, None)
    model, theirs = read_model(config), toys.transformers.MistralConfig(**config)
    assert model.max_position_embeddings == theirs.sliding_window
    assert model.num_query_groups == theirs.num_key_value_heads


def test_sliding_window_limits_the_positions():
    config = json.loads((Path(__file__).parent / "mistral_config.json").read_text())
    assert read_model(config).max_position_embeddings == 4096
    assert read_model(config | {"sliding_window": None}).max_position_embeddings == 32768


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


def test_index_that_names_a_pickle(theirs):
    """It is not read as one without --allow-pickle; nor with it, for the index is of safetensors."""
    torch.save({name: t for name, t in toys.tensors_of(theirs).items()}, theirs / "anything.bin")
    index = theirs / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "anything.bin")
    index.write_text(json.dumps(content))
    for allowed in (False, True):
        with pytest.raises(InterchangeError, match="names anything.bin, which is no .safetensors file"):
            open_source(theirs, allow_pickle=allowed)
    index.rename(theirs / "pytorch_model.bin.index.json")
    for file in theirs.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InterchangeError, match="as a pickle"):
        open_source(theirs)
    assert open_source(theirs, allow_pickle=True).model.num_layers == 2


def test_one_file_and_an_index_of_others(theirs):
    """transformers would take the file, the index says the shards: one of them is another model's."""
    save_file(toys.tensors_of(theirs), theirs / "model.safetensors")
    with pytest.raises(
        InterchangeError, match="model.safetensors and model.safetensors.index.json.*two models"
    ):
        open_source(theirs)
    index = theirs / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert open_source(theirs).model.num_layers == 2


@pytest.mark.parametrize("both", [False, True])
def test_tied_matrix_under_the_name_of_the_head(tmp_path, both):
    folder = toys.folder(tmp_path / "tied", "llama", 4, True)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"] if both else tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    assert torch.equal(open_source(folder).get("embedding.word_embeddings.weight"), embedding)


def test_head_of_a_tied_model_that_does_not_say_so(tmp_path):
    folder = toys.folder(tmp_path / "tied", "llama", 4, True)
    configure(folder, tie_word_embeddings=None)
    with pytest.raises(InterchangeError, match="lm_head.weight is missing .*tie_word_embeddings"):
        open_source(folder)


def test_pickled_tensors_larger_than_their_file(tmp_path):
    folder = toys.folder(tmp_path / "one", "llama", 2, False)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InterchangeError, match="'lm_head.weight' is no plain tensor"):
        open_source(folder, allow_pickle=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(tmp_path, value):
    folder = toys.folder(tmp_path / "one", "llama", 2, False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    source = open_source(folder)
    with pytest.raises(InterchangeError, match="decoder.layers.1.*linear_qkv.weight holds NaN or Inf"):
        write_checkpoint(tmp_path / "ours", source.model, source.dtype, source.get)
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
    write_checkpoint(tmp_path / "ours", source.model, source.dtype, source.get)
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
    model = toys.pi_model(vocab_size=of_path(base / "small.model").size, padded_vocab_size=1024)
    toys.checkpoint(base / "ours", model, of_path(base / "small.model"))
    source = open_source(base / "ours")
    export_folder(base / "hf", source.model, source.dtype, source.get, tokenizer=source.tokenizer)
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


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quick_geglu": True}, "only Llama-like models can be exchanged: quick_geglu is True, not False"),
        ({"augmented_shortcut_reduction": 2**40}, "--augmented-shortcut-reduction .*no model is as large"),
        ({"rotary_base": None}, "nothing says rotary_base"),
    ],
)
def test_checkpoints_of_other_models(tmp_path, said, message):
    """The reason names the file that says so."""
    toys.checkpoint(tmp_path / "ours", toys.pi_model())
    folder = next((tmp_path / "ours").glob("iter_*"))
    common = folder / "common.pt"
    content = torch.load(common, weights_only=False)
    vars(content["args"]).update(said)
    torch.save(content, common)
    files = {path.name: describe_file(path) for path in folder.iterdir() if path.name != CHECKSUMS}
    (folder / CHECKSUMS).write_bytes(marker(0, files))
    with pytest.raises(InterchangeError, match=f"{common}.*{message}"):
        open_source(tmp_path / "ours")


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(InterchangeError, match="there is no such folder"):
        open_source(tmp_path / "nothing")
    with pytest.raises(InterchangeError, match="neither a Hugging Face folder"):
        open_source(tmp_path)


def test_taken_targets(exported, theirs):
    source = open_source(theirs)
    with pytest.raises(InterchangeError, match="holds checkpoints already"):
        write_checkpoint(exported / "ours", source.model, source.dtype, source.get)
    with pytest.raises(InterchangeError, match="is taken"):
        export_folder(exported / "hf", source.model, source.dtype, source.get)


def test_tensors_that_are_not_the_models(tmp_path):
    model = toys.pi_model()
    get = toys.random_tensors(model)
    pairs = [(name, get(name)) for name in model.parameters()]
    for wrong, message in (
        (pairs[:-1], "did not come: output_layer.weight"),
        ([*pairs, pairs[0]], "came twice"),
        ([(pairs[0][0], pairs[0][1][:, 1:]), *pairs[1:]], "it must be"),
    ):
        with pytest.raises(InterchangeError, match=message):
            write_checkpoint(tmp_path / "ours", model, torch.float32, iter(wrong))
        assert not (tmp_path / "ours").exists()
