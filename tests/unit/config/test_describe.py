"""Calculated sizes of a model, compared with the model itself."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext.arguments.parser import read_args
from megatron_ext.config import describe, footprint
from megatron_ext.config.presets import PRESETS, preset
from megatron_ext.kernels import fused
from megatron_ext.models.builder import build_model
from megatron_ext.models.config import transformer_config
from megatron_ext.training.muon import is_hidden_matrix
from tests.helpers.models import positions, tokens
from tests.unit.models.test_stock_variants import SHAPE as STOCK
from tests.unit.models.test_stock_variants import VARIANTS

REPOSITORY = Path(__file__).resolve().parents[3]
RUN = "--mock-data --tokenizer-type NullTokenizer --vocab-size 99 --lr 1e-3 --train-iters 10 --seq-length 32"
PI = (
    "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear "
    "--series-activation-order 2 --augmented-shortcuts 2 --augmented-shortcut-reduction 8"
)
#: What other makers' models have.
OTHERS = {
    "olmo2": "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear "
    "--qk-layernorm --qk-layernorm-across-heads --norm-placement output",
    "gemma3": "--position-embedding-type rope --geglu --normalization RMSNorm --disable-bias-linear "
    "--kv-channels 32 --qk-layernorm --norm-placement both --apply-layernorm-1p --window-size 9,0 "
    "--window-attn-skip-freq 2 --window-rotary-base 500 --embedding-multiplier 8",
}
PLAIN = "--num-layers 3 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 32"


def built_parameters(run, vocabulary: int) -> int:
    """Parameters of the built model, without memory for their values."""
    from megatron.core.models.gpt import GPTModel

    from megatron_ext.models.config import transformer_config
    from megatron_ext.models.layer_specs import block_spec

    config = transformer_config(run)
    with FakeTensorMode():
        model = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config),
            vocab_size=vocabulary,
            max_sequence_length=run.model.max_position_embeddings,
            share_embeddings_and_output_weights=not run.model.untie_embeddings_and_output_weights,
            position_embedding_type=run.model.position_embedding_type,
        )
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "flags",
    [
        "--model-preset tiny",
        "--model-preset small --series-activation-order 3 --augmented-shortcuts 2",
        "--model-preset tiny --series-activation-order 0 --augmented-shortcuts 0",
        f"{PLAIN}",
        f"{PLAIN} --disable-bias-linear --add-qkv-bias --normalization RMSNorm --qk-layernorm --swiglu",
        f"{PLAIN} --group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights",
        f"{PLAIN} --position-embedding-type rope --kv-channels 32",
        *(f"{PLAIN} {flags}" for flags in OTHERS.values()),
    ],
)
def test_parameters_equal_the_built_models(single_process, flags):
    run = read_args(f"{RUN} --micro-batch-size 1 {flags}".split(), world_size=1, device="cpu")
    assert run.but(padded_vocab_size=128).model.num_parameters == built_parameters(run, 128)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("pangu")])
def test_paper_models_parameters_equal_the_built_models(single_process, name):
    run = read_args(f"{RUN} --micro-batch-size 1 --model-preset {name}".split(), world_size=1, device="cpu")
    model = preset(name)
    assert model.num_parameters == built_parameters(run, model.vocab_rows)
    assert sum(describe.parts(model).values()) == model.num_parameters


@pytest.mark.parametrize(("name", "total"), [("1b-pro", 1.0e9), ("1.5b-pro", 1.5e9)])
def test_pro_models_are_as_large_as_the_paper_says(name, total):
    assert preset(name).num_parameters == pytest.approx(total, rel=0.01)


def test_embedding_shares():
    share = {name: describe.embedding_share(preset(name)) for name in PRESETS}
    assert share["pangu-pi-1b"] == pytest.approx(0.3819, abs=0.002)
    assert share["pangu-pi-1b-pro"] < 0.20


@pytest.mark.parametrize("flags", [*VARIANTS.values(), PI, *OTHERS.values()], ids=[*VARIANTS, "pi", *OTHERS])
def test_flops_are_those_that_torch_counts(single_process, monkeypatch, flags):
    monkeypatch.setattr(fused, "_kernels", None)  # torch counts its own operators only
    run = read_args([*STOCK.split(), *flags.split()], world_size=1, device="cpu")
    run = run.but(padded_vocab_size=256)
    shape, length = run.model, run.data.seq_length
    [model] = build_model(transformer_config(run), run)
    ids = tokens()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, positions(ids), None, labels=ids.roll(-1, 1)).mean().backward()
    hidden = sum(length - seen for seen in shape.keys_seen(length))
    masked = 6 * 2 * shape.query_width * hidden  # which plain attention multiplies too
    assert counter.get_total_flops() == ids.numel() * (shape.flops_per_token(length) + masked)


def test_keys_that_a_token_sees():
    """Counted one by one, but for the half of its own that the diagonal of full attention leaves out."""
    model = replace(preset("tiny"), num_layers=2, window_size=(9, 0), window_attn_skip_freq=(1, 0))
    length = 64
    one_by_one = sum(min(position + 1, 10) for position in range(length)) / length
    windowed, full = model.keys_seen(length)
    assert full == length / 2 and windowed == pytest.approx(one_by_one, abs=0.5)
    assert model.keys_seen(6) == [3, 3], "a window wider than the sequence"


class TestMemory:
    """Memory of a layout."""

    SHAPE = preset("1b-pro")

    def test_one_device_holds_everything(self):
        total, memory = self.SHAPE.num_parameters, footprint.memory(self.SHAPE, describe.Layout())
        assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (
            4 * total,
            4 * total,
            8 * total,
        )

    def test_bf16_keeps_main_weights(self):
        total = self.SHAPE.num_parameters
        memory = footprint.memory(self.SHAPE, describe.Layout(bytes_each=2))
        assert sum(memory.values()) - memory["activations"] == 18 * total

    def test_distributed_optimizer_divides_its_state(self):
        whole = footprint.memory(self.SHAPE, describe.Layout(data=8))
        shared = footprint.memory(self.SHAPE, describe.Layout(data=8, distributed_optimizer=True))
        assert shared["optimizer"] == whole["optimizer"] / 8
        assert shared["weights"] == whole["weights"]

    def test_muon_keeps_one_moment_of_hidden_matrices(self):
        expected = 0
        for name, size in self.SHAPE.parameters().items():
            matrix = is_hidden_matrix(name, torch.empty(size, device="meta"))
            expected += math.prod(size) * (4 if matrix else 8)
        whole = footprint.memory(self.SHAPE, describe.Layout(data=8, muon=True))["optimizer"]
        assert whole == pytest.approx(expected, rel=1e-3)
        shared = footprint.memory(self.SHAPE, describe.Layout(data=8, muon=True, layer_wise=True))
        assert shared["optimizer"] == whole / 8

    def test_stages_hold_the_whole_model_once(self):
        layout = describe.Layout(pipeline=3)
        held = sum(describe.parameters_of_rank(self.SHAPE, layout, stage) for stage in range(3))
        assert held == pytest.approx(self.SHAPE.num_parameters)

    def test_recomputation_and_sequence_parallelism_save_activations(self):
        def activations(**layout):
            return footprint.memory(self.SHAPE, describe.Layout(**layout))["activations"]

        assert activations(recompute=True) < activations() / 3
        assert activations(tensor=2, sequence_parallel=True) < activations(tensor=2)


def test_candidates_keep_the_budget():
    like = preset("1b-pro")
    found = list(describe.candidates(1.0e9, like))
    assert len(found) > 20
    for shape in found:
        assert shape.num_parameters == pytest.approx(1.0e9, rel=0.01)
        assert shape.ffn_hidden_size % 128 == 0 and 2 <= shape.ffn_hidden_size / shape.hidden_size <= 4


def run_tool(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "tools/describe_model.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_tool_prints_json_and_refuses_bad_usage():
    done = run_tool("--model-preset", "1b-pro", "--json")
    assert done.returncode == 0
    summary = json.loads(done.stdout)
    assert sum(summary["parameters"].values()) == summary["total_parameters"]
    failed = run_tool("--model-preset", "2b")
    assert failed.returncode == 2
    assert "there is no such preset" in failed.stderr
