"""A model's function is taken from its checkpoint and never contradicted; one table defines it."""

import ast
import dataclasses
import inspect
from argparse import Namespace
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch

from megatron_ext.arguments.parser import CommandLineError, read_args
from megatron_ext.arguments.unsupported import known_to_upstream
from megatron_ext.checkpoint.saved_args import arguments_of
from megatron_ext.config import RunConfig, model_function, options
from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange import llama
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.models import builder

RUN = """--mock-data --tokenizer-type NullTokenizer --vocab-size 99 --lr 1e-3 --train-iters 10
    --micro-batch-size 2"""
LLAMA = """--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --kv-channels 16
    --group-query-attention --num-query-groups 1 --max-position-embeddings 64 --position-embedding-type rope
    --rotary-base 500000 --rotary-percent 0.5 --rotary-seq-len-interpolation-factor 2 --use-rope-scaling
    --rope-scaling-factor 32 --swiglu --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear
    --add-qkv-bias --qk-layernorm --qk-layernorm-across-heads --norm-placement both --apply-layernorm-1p
    --no-rope-freq 2 --window-size 9,0 --window-attn-skip-freq 2 --window-rotary-base 500 --softmax-scale 0.5
    --embedding-multiplier 2 --residual-multiplier 0.5 --logits-scaling 3
    --untie-embeddings-and-output-weights --series-activation-order 2 --augmented-shortcuts 1
    --augmented-shortcut-reduction 16"""
GPT = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64
    --position-embedding-type learned_absolute"""


def read(line: str) -> RunConfig:
    return read_args(f"{RUN} --seq-length 32 {line}".split(), world_size=1, device="cpu")


def differences(saved: RunConfig, run: RunConfig) -> list[str]:
    return model_function.differences(saved.flat(), run.model)


def problems_of(line: str) -> str:
    with pytest.raises(CommandLineError) as caught:
        read(line)
    return str(caught.value)


def checkpoint(folder: Path, run, iteration: int = 1) -> Path:
    """A folder whose checkpoint says ``run``; there is nothing else in it."""
    place = folder / f"iter_{iteration:07d}"
    place.mkdir(parents=True)
    torch.save({"args": run if isinstance(run, Namespace) else arguments_of(run)}, place / "common.pt")
    with open(place / "__0_0.distcp", "wb") as tensors:
        tensors.truncate(1 << 30)  # as large as any of these models, without taking room
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def another(name: str, value):
    """A value of the option that is not ``value``."""
    kind = options()[name].annotation
    if isinstance(value, bool):
        return not value
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, tuple):
        return (value[0] * 2, *value[1:])
    return 3 if value is None else value * 2 or 1


def test_every_field_of_a_model_is_compared():
    """A new field is compared unless it is listed as determined by the vocabulary."""
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields == {*model_function.names()} | {"padded_vocab_size", "softmax_vocab_size"}
    assert {*read(LLAMA).model.effective()} == {*model_function.names()}


@pytest.mark.parametrize("name", model_function.names())
def test_a_difference_of_any_is_seen(name):
    seen = []
    for line in (LLAMA, GPT):
        run = read(line)
        saved = run.flat()
        changed = ModelConfig.draft(**vars(run.model) | {name: another(name, saved[name])})
        seen += model_function.differences(saved, changed)
        assert model_function.differences(saved, run.model) == []
    assert any(model_function.spelled(name) in difference for difference in seen)


def test_what_a_model_is_built_from_is_compared():
    """The builder reads only the model and a seed of the configuration."""
    functions = builder.build_model, builder.build_chunks, builder._build_chunk
    tree = ast.parse("".join(map(inspect.getsource, functions)))
    read_there = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "run"
    }
    assert read_there == {"run.model", "run.init"}


def test_what_an_exchanged_model_cannot_say_has_one_value():
    """Each argument that defines the function is read, or other values of it are refused."""
    saved = read(LLAMA).flat() | {"rotary_seq_len_interpolation_factor": None, "padded_vocab_size": 128}
    model, refused = llama.of_saved(saved, 100), set()
    for name in model_function.names():
        changed = saved | {name: another(name, saved[name])}
        if name == "geglu":
            changed |= {"swiglu": False, "series_activation_order": 0}
        try:
            assert llama.of_saved(changed, 100) != model, name
        except InterchangeError as error:
            assert f"only Llama-like models can be exchanged: {name} is" in str(error)
            refused.add(name)
    assert refused == {*llama.LLAMA, "swiglu"}


#: Flags of Megatron-LM that matter only beside one of ALWAYS, or that change rounding or training alone.
OF_THOSE = {
    *("--q-lora-rank", "--kv-lora-rank", "--qk-head-dim", "--qk-pos-emb-head-dim", "--v-head-dim"),
    *("--rotary-scaling-factor", "--mscale", "--mscale-all-dim", "--cache-mla-latents"),
    *("--dsa-indexer-n-heads", "--dsa-indexer-head-dim", "--dsa-indexer-topk", "--dsa-indexer-loss-coeff"),
    *("--dsa-indexer-use-sparse-loss", "--linear-conv-kernel-dim", "--linear-key-head-dim"),
    *("--linear-value-head-dim", "--linear-num-key-heads", "--linear-num-value-heads"),
    *("--qk-clip", "--qk-clip-alpha", "--qk-clip-threshold"),
    *("--log-max-attention-logit", "--apply-query-key-layer-scaling", "--relative-attention-num-buckets"),
    *("--relative-attention-max-distance", "--encoder-num-layers", "--decoder-num-layers"),
    *("--encoder-seq-length", "--decoder-seq-length", "--use-te-activation-func", "--bert-no-binary-head"),
    *("--mamba-state-dim", "--mamba-head-dim", "--mamba-num-groups", "--mamba-num-heads"),
    *("--disable-mamba-mem-eff-path", "--hybrid-attention-ratio", "--hybrid-mlp-ratio"),
    *("--mtp-loss-scaling-factor", "--mtp-standalone", "--use-legacy-models"),
}  # fmt: skip


def test_each_of_upstreams_other_architectures_is_noticed():
    reasons = ("attention is causal", "the model is a decoder of dense")
    flags = {flag for flag, reason in known_to_upstream().items() if reason.startswith(reasons)}
    watched = {"--" + name.replace("_", "-") for name in model_function.ALWAYS}
    assert flags - watched == OF_THOSE
    assert watched - flags == {"--num-experts"}


def test_what_the_command_line_leaves_open_is_taken(tmp_path, capsys):
    saved = read(LLAMA)
    run = read(f"--load {checkpoint(tmp_path, saved)}")
    assert run.model == saved.model
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"taken from the checkpoint in --load {tmp_path}: --num-layers 2, ")
    assert "--rotary-base 500000" in line and "--norm-epsilon (layernorm_epsilon) 1e-06" in line


def test_nothing_is_said_where_nothing_changes(tmp_path, capsys):
    read(f"{LLAMA} --load {checkpoint(tmp_path, read(LLAMA))}")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--rotary-base 10000", "--rotary-base: checkpoint 500000, this run 10000"),
        ("--norm-epsilon 1e-5", "--norm-epsilon (layernorm_epsilon): checkpoint 1e-06, this run 1e-05"),
        ("--position-embedding-type none", "--position-embedding-type: checkpoint rope, this run none"),
        ("--rope-scaling-factor 8", "--rope-scaling-factor: checkpoint 32.0, this run 8.0"),
        ("--normalization LayerNorm", "--normalization: checkpoint RMSNorm, this run LayerNorm"),
        ("--quick-geglu", "--quick-geglu: checkpoint False, this run True"),
        ("--num-query-groups 2 --group-query-attention", "--num-query-groups: checkpoint 1, this run 2"),
        ("--augmented-shortcut-reduction 32", "--augmented-shortcut-reduction: checkpoint 16, this run 32"),
        ("--model-preset tiny", "--num-layers: checkpoint 2, this run 8"),
    ],
)
@pytest.mark.parametrize("way", ["--load {}", "--load {}/none --pretrained-checkpoint {}"])
def test_what_is_typed_must_not_contradict(tmp_path, typed, told, way):
    folder = checkpoint(tmp_path, read(LLAMA))
    text = problems_of(f"{way.format(folder, folder)} {typed}")
    assert told in text and "of another model" in text
    assert f"checkpoint in {way.split()[-2]} {folder}" in text


def test_a_preset_that_says_the_same_goes_on(tmp_path):
    folder = checkpoint(tmp_path, read("--model-preset tiny"))
    assert read(f"--model-preset tiny --load {folder}").model.augmented_shortcuts == 1


def test_a_preset_gives_way_to_the_checkpoint_where_that_is_asked_for(tmp_path):
    folder = checkpoint(tmp_path, read(f"{LLAMA} --hidden-dropout 0.25"))
    run = read(f"--model-preset tiny --use-checkpoint-args --load {folder}")
    assert (run.model.rotary_base, run.model.num_layers, run.layers.hidden_dropout) == (500000, 2, 0.25)
    assert "--rotary-base: checkpoint 500000, this run 7" in problems_of(
        f"--use-checkpoint-args --load {folder} --rotary-base 7"
    )


def test_as_many_groups_as_heads_are_none():
    plain, grouped = read(GPT), read(f"{GPT} --group-query-attention --num-query-groups 4")
    assert differences(plain, grouped) == []
    assert differences(plain, read(f"{GPT} --group-query-attention --num-query-groups 2"))


def test_positions_matter_where_they_are_learned():
    assert differences(read(GPT), read(f"{GPT} --max-position-embeddings 128"))
    assert not differences(read(LLAMA), read(f"{LLAMA} --max-position-embeddings 128"))


#: Of an older version of Megatron-LM, without the options of later ones and of ours.
UPSTREAM = Namespace(
    num_layers=2, hidden_size=64, ffn_hidden_size=256, num_attention_heads=4, kv_channels=16,
    norm_epsilon=1e-6, group_query_attention=False, num_query_groups=1, position_embedding_type="rope",
    max_position_embeddings=64, add_bias_linear=True, normalization="RMSNorm", swiglu=False,
    untie_embeddings_and_output_weights=True,
)  # fmt: skip


def test_what_an_older_megatron_lm_does_not_say_is_its_default(tmp_path):
    folder = checkpoint(tmp_path, UPSTREAM)
    run = read(f"--load {folder}")
    assert (run.model.normalization, run.model.rotary_base, run.model.add_qkv_bias) == (
        "RMSNorm",
        10000,
        True,
    )
    assert run.model.layernorm_epsilon == 1e-6
    found = problems_of(f"--load {folder} --rotary-base 1000000 --use-rope-scaling --norm-epsilon 1e-5")
    for flag in ("--rotary-base", "--use-rope-scaling", "--norm-epsilon"):
        assert f"{flag}: checkpoint" in found or f"{flag} (layernorm_epsilon): checkpoint" in found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotary_interleaved", True),
        ("qk_l2_norm", True),
        ("num_experts", 8),
        ("rope_type", "yarn"),
        ("glu_linear_offset", 1.0),
    ],
)
def test_a_model_that_no_flag_here_describes_is_refused(tmp_path, name, value):
    folder = checkpoint(tmp_path, Namespace(**vars(UPSTREAM) | {name: value}))
    assert f"{name} (Megatron-LM's): checkpoint {value}" in problems_of(f"--load {folder}")


def test_one_that_cannot_be_read_leaves_it_to_the_one_before(tmp_path):
    checkpoint(tmp_path, read(LLAMA), 1)
    newest = checkpoint(tmp_path, read(LLAMA), 2) / "iter_0000002" / "common.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    assert read(f"--load {tmp_path}").model.rotary_base == 500000


@pytest.mark.parametrize(
    ("told", "field", "value"),
    [
        ({"apply_layernorm_1p": True}, "layernorm_zero_centered_gamma", True),
        ({"window_size": (128, 0), "window_attn_skip_freq": [1, 0]}, "windowed", (1, 0)),
        ({"no_rope_freq": [0, 1]}, "unrotated", (0, 1)),
        ({"no_rope_freq": 2}, "unrotated", (0, 1)),
    ],
)
def test_upstreams_words_for_what_a_layer_has(tmp_path, told, field, value):
    run = read(f"--load {checkpoint(tmp_path, Namespace(**vars(UPSTREAM) | told))}")
    assert getattr(run.model, field) == value


def test_a_pattern_and_its_list_are_the_same_model():
    listed = read(LLAMA.replace("--no-rope-freq 2", "--no-rope-freq [0]+[1]*1"))
    assert listed.model.no_rope_freq == (0, 1) and not differences(listed, read(LLAMA))
