"""A PanGu-pi model in transformers: the same logits, the same text, the same tokenizer."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_ext.arguments.of_checkpoint import arguments_of
from megatron_ext.checkpoint import load_checkpoint, read_checkpoint_args
from megatron_ext.checkpoint.saved_args import run_of
from megatron_ext.inference import Sampling, generate
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.export import export_folder
from megatron_ext.interchange.hf_tokenizer import write_tokenizer
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.target import write_checkpoint
from megatron_ext.interchange.tokenizer_files import of_path
from megatron_ext.models.builder import build_model
from megatron_ext.models.config import transformer_config
from megatron_ext.tokenizer import build_tokenizer
from megatron_ext.tokenizer.encoder import NativeEncoder
from tests.unit.tokenizer import hf_folders
from tests.unit.tokenizer.sample_models import corpus_lines, trained

toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")
transformers = toys.transformers
tokenizers = pytest.importorskip("tokenizers")
MODELS = {
    "series and shortcut": toys.pi_model(),
    "series alone, tied, biases": toys.pi_model(augmented_shortcuts=0, tied=True, add_qkv_bias=True),
    "shortcut alone, every head its own group": toys.pi_model(series_activation_order=0, num_query_groups=4),
    "qwen3 with both": toys.pi_model(qk_layernorm=True, kv_channels=32),
    "olmo2 with both": toys.pi_model(
        qk_layernorm=True, qk_layernorm_across_heads=True, norm_placement="output", no_rope_freq=(0, 1)
    ),
    "phi3 and granite with both": toys.pi_model(
        rotary_percent=0.5,
        softmax_scale=0.3,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=4.0,
    ),
    "gemma3 with shortcuts": toys.pi_model(
        series_activation_order=0,
        geglu=True,
        qk_layernorm=True,
        norm_placement="both",
        layernorm_zero_centered_gamma=True,
        window_size=(9, 0),
        window_attn_skip_freq=(1, 0),
        window_rotary_base=100,
    ),
}


def export(load: Path, save: Path, **options) -> Path:
    """The folder of a checkpoint."""
    source = open_source(load)
    return export_folder(save, source.model, source.dtype, source.get, tokenizer=source.tokenizer, **options)


def in_transformers(folder: Path):
    """The model as a user loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def ours(load: Path, weights: Path | None = None):
    """The model as this project loads it, in a world of one; its weights from another checkpoint if given."""
    run = arguments_of(read_checkpoint_args(load), load)
    run.checkpoint.finetune = weights is not None
    model = build_model(transformer_config(run), run)
    assert load_checkpoint(weights or load, model=model, run=run) is not None
    return model[0].eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_text_and_way_back(single_process, tmp_path, name):
    config = MODELS[name]
    load = toys.checkpoint(tmp_path / "ours", config)
    folder = export(load, tmp_path / name.split()[0], shard_bytes=50_000)
    theirs, ids = in_transformers(folder), torch.randint(0, 300, (3, 40))
    assert type(theirs).__name__ == "PanguPiForCausalLM"
    model = ours(load)
    expected = model(ids, torch.arange(40).expand_as(ids), None)[..., : config.vocab_size]
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)

    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    cached, computed = (theirs.generate(ids[:, :9], use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, computed) and cached.size(1) == 29
    greedy = generate(model, ids[0, :9].tolist(), 20, Sampling(temperature=0), config.vocab_size)
    assert list(greedy) == cached[0, 9:].tolist()
    assert toys.same(load, folder)


@torch.no_grad()
def test_padded_batch_generates_what_each_prompt_does(tmp_path):
    folder = export(toys.checkpoint(tmp_path / "ours", toys.pi_model()), tmp_path / "padded")
    model, options = in_transformers(folder), dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    short, long = torch.randint(1, 300, (1, 5)), torch.randint(1, 300, (1, 9))
    batch = torch.cat([torch.nn.functional.pad(short, (4, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    together = model.generate(batch, attention_mask=mask, **options)[:, 9:]
    alone = [model.generate(p, attention_mask=torch.ones_like(p), **options)[:, -8:] for p in (short, long)]
    assert torch.equal(together, torch.cat(alone))


def test_a_folder_of_tokenizer_json_alone_comes_along(tmp_path):
    """As tools/compress_tokenizer.py writes it: without a config.json."""
    tokenizer = of_path(hf_folders.byte_level(tmp_path / "tokenizer"))
    model = toys.pi_model(vocab_size=tokenizer.size, padded_vocab_size=512)
    load = toys.checkpoint(tmp_path / "ours", model, tokenizer)
    folder = export(load, tmp_path / "exported")
    back, meant = (
        transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "tokenizer")
    )
    assert back("the model of 2048")["input_ids"] == meant("the model of 2048")["input_ids"]


def test_fresh_model_starts_as_plain_silu(tmp_path):
    folder = export(toys.checkpoint(tmp_path / "ours", toys.pi_model()), tmp_path / "fresh")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    series = model.model.layers[1].mlp.series_activation
    x = torch.randn(4, 96)
    torch.testing.assert_close(series(x), torch.nn.functional.silu(x), rtol=0, atol=0)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> Path:
    """A checkpoint whose tokenizer is a SentencePiece model, and its exported folder."""
    base = tmp_path_factory.mktemp("tokenizer")
    (base / "small.model").write_bytes(trained())
    tokenizer = of_path(base / "small.model")
    model = toys.pi_model(vocab_size=tokenizer.size, padded_vocab_size=1024)
    load = toys.checkpoint(base / "ours", model, tokenizer)
    (base / "small.model").unlink()  # the checkpoint has its own copy
    export(load, base / "hf")
    return base


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokenizer_gives_our_ids(tmp_path, kind, fast):
    (tmp_path / "small.model").write_bytes(trained(kind))
    (tmp_path / "hf").mkdir()
    write_tokenizer(of_path(tmp_path / "small.model"), tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", use_fast=fast)
    encoder = NativeEncoder(model_proto=trained(kind))
    for line in corpus_lines(toys.random.Random(11), 200):
        ids = theirs(line).input_ids
        assert ids == encoder.encode(line).tolist()
        assert theirs.decode(ids) == line
    assert (theirs.eos_token_id, theirs.bos_token_id) == (
        encoder.processor.eos_id(),
        encoder.processor.bos_id(),
    )


def test_tokenizer_of_a_folder_goes_back_as_it_came(with_tokenizer, tmp_path):
    """One that is described by tokenizer.json alone, with a token added to it."""
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    described = json.loads((with_tokenizer / "hf" / names[0]).read_text())
    described["added_tokens"].append(described["added_tokens"][0] | {"id": 900, "content": "<new>"})
    for name in names[1:]:
        (folder / name).write_bytes((with_tokenizer / "hf" / name).read_bytes())
    (folder / names[0]).write_text(json.dumps(described))
    tokenizer = of_path(folder)
    assert (tokenizer.kind, tokenizer.size) == ("HuggingFaceTokenizer", 901)

    load = toys.checkpoint(
        tmp_path / "ours", toys.pi_model(vocab_size=901, padded_vocab_size=1024), tokenizer
    )
    built = build_tokenizer(run_of(read_checkpoint_args(load)).tokenizer)
    assert (built.sha256, built.vocab_size) == (tokenizer.sha256, 901)
    out = export(load, tmp_path / "hf")
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2


@pytest.fixture
def biased(tmp_path) -> Path:
    """A checkpoint that is exported as a Qwen2, with a SentencePiece tokenizer."""
    (tmp_path / "small.model").write_bytes(trained())
    tokenizer = of_path(tmp_path / "small.model")
    plain = dict(series_activation_order=0, augmented_shortcuts=0, add_qkv_bias=True)
    model = toys.pi_model(vocab_size=tokenizer.size, padded_vocab_size=1024, **plain)
    return toys.checkpoint(tmp_path / "ours", model, tokenizer)


def test_a_tokenizer_that_transformers_would_read_otherwise(biased, tmp_path):
    """Beside a Qwen2 transformers cuts texts in Qwen2's way, whatever tokenizer.json says."""
    with pytest.raises(InterchangeError, match="Qwen2Tokenizer, which encodes otherwise .*hf-architecture"):
        export(biased, tmp_path / "qwen2")
    assert not (tmp_path / "qwen2").exists()
    folder = export(biased, tmp_path / "pangu_pi", architecture="pangu_pi")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    line = "import numpy, twice: the tokens of 2024"
    assert theirs(line).input_ids == NativeEncoder(model_proto=trained()).encode(line).tolist()


def test_a_tokenizer_is_read_as_the_folder_it_came_from(tmp_path):
    """A Qwen2 whose tokenizer names no class of its own: transformers goes by the model's type."""
    folder = toys.folder(tmp_path / "hf", "qwen2", 2, True)
    described = tokenizers.Tokenizer(tokenizers.models.BPE())
    described.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["</s>"], initial_alphabet=alphabet, vocab_size=300
    )
    described.train_from_iterator(corpus_lines(toys.random.Random(3), 50), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=described, eos_token="</s>").save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    source = open_source(folder)
    load = tmp_path / "ours"
    write_checkpoint(load, source.model, source.dtype, source.get, tokenizer=source.tokenizer)
    text = "U\u0308ni\u0301 12345 it's\n\n x"
    expected = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert build_tokenizer(run_of(read_checkpoint_args(load)).tokenizer).tokenize(text) == expected
    back = transformers.AutoTokenizer.from_pretrained(export(load, tmp_path / "back"))
    assert back(text).input_ids == expected


@torch.no_grad()
def test_upstreams_checkpoint_becomes_llama(single_process, shared, tmp_path):
    golden = shared / "reference" / "golden" / "gqa_1p" / "checkpoint"
    source = open_source(golden)
    out = export_folder(tmp_path / "hf", source.model, source.dtype, source.get)
    write_checkpoint(tmp_path / "ours", source.model, source.dtype, source.get)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM" and source.iteration == 10
    ids = torch.randint(0, 256, (2, 64))
    logits = ours(tmp_path / "ours", golden)(ids, torch.arange(64).expand_as(ids), None)
    torch.testing.assert_close(
        theirs(ids).logits, logits[..., : source.model.vocab_size], rtol=1e-5, atol=1e-5
    )


def test_any_configuration_of_a_llama_is_exported(tmp_path):
    """One that says the same in other words, as a preset does; another kind of model is refused."""
    plain = toys.pi_model(series_activation_order=0, augmented_shortcuts=0, num_query_groups=4)
    words = {"group_query_attention": False, "num_query_groups": None, "augmented_shortcut_reduction": 8}
    other = dataclasses.replace(plain, **words)
    export_folder(tmp_path / "hf", other, torch.float32, toys.random_tensors(other))
    assert open_source(tmp_path / "hf").model == plain
    gelu = dataclasses.replace(plain, swiglu=False)
    with pytest.raises(InterchangeError, match="only Llama-like models can be exchanged: swiglu is False"):
        export_folder(tmp_path / "gelu", gelu, torch.float32, toys.random_tensors(gelu))
    assert not (tmp_path / "gelu").exists()


def test_folder_is_complete(with_tokenizer):
    folder = with_tokenizer / "hf"
    generation = json.loads((folder / "generation_config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == 2
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card and "AutoTokenizer" in card
    back = open_source(folder)
    assert back.tokenizer.sha256 == open_source(with_tokenizer / "ours").tokenizer.sha256
    assert back.tokenizer.kind == "SentencePieceTokenizer"


def test_lm_eval_runs_on_it(with_tokenizer, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval (pip install lm_eval)")
    documents = [{"text": "the model of", "label": 0}, {"text": "import numpy", "label": 1}]
    (tmp_path / "items.json").write_text("\n".join(json.dumps(item) for item in documents))
    task = {
        "task": "two_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": ["tokens", "encoder"],
        "metric_list": [{"metric": "acc"}],
    }
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={with_tokenizer / 'hf'},trust_remote_code=True,device=cpu,dtype=float32",
        tasks=[task],
        bootstrap_iters=0,
    )
    samples = results["samples"]["two_words"]
    assert len(samples) == 2 and results["results"]["two_words"]["acc,none"] in (0.0, 0.5, 1.0)
    # lm_eval's log likelihoods are the model's own.
    model = in_transformers(with_tokenizer / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(with_tokenizer / "hf")
    ids = torch.tensor([tokenizer("the model of tokens").input_ids])
    context = len(tokenizer("the model of").input_ids)
    with torch.no_grad():
        logs = torch.log_softmax(model(ids[:, :-1]).logits, -1)[0]
    expected = sum(logs[i - 1, ids[0, i]].item() for i in range(context, ids.size(1)))
    first = next(s for s in samples if s["doc"]["text"] == "the model of")
    assert first["filtered_resps"][0][0] == pytest.approx(expected, abs=1e-4)


def test_args_build_tokenizer_and_vocabulary(with_tokenizer):
    run = run_of(read_checkpoint_args(with_tokenizer / "ours"))
    tokenizer = build_tokenizer(run.tokenizer)
    assert (run.tokenizer.vocab_size, run.model.padded_vocab_size) == (tokenizer.vocab_size, 1024)
