"""Traced steps of rank 0 in real layouts: shapes, groups, FLOPs and memory against the calculation."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from megatron_ext.arguments.parser import read_args
from megatron_ext.config import RunConfig, describe, footprint
from megatron_ext.config.model import ModelConfig
from megatron_ext.training.trace import Trace, trace

COMMON = (
    "--bf16 --use-distributed-optimizer --mock-data --tokenizer-type NullTokenizer --lr 1e-4 --train-iters 9 "
    "--transformer-impl local"
)
PRO = f"{COMMON} --model-preset pangu-pi-1.5b-pro --vocab-size 48000"
FULL = f"{COMMON} --model-preset pangu-pi-7b --vocab-size 100883"
#: name -> (processes, whether they have Triton, flags).
CASES = {
    "1.5b-tp1-dp1024": (1024, True, f"{PRO} --micro-batch-size 4 --global-batch-size 8192"),
    "1.5b-tp8-sequence-parallel": (
        1024,
        True,
        f"{PRO} --micro-batch-size 4 --tensor-model-parallel-size 8 --sequence-parallel",
    ),
    "1.5b-pp4-interleaved": (
        1024,
        True,
        f"{PRO} --micro-batch-size 1 --global-batch-size 8192 --pipeline-model-parallel-size 4 "
        "--num-virtual-stages-per-pipeline-rank 2 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split",
    ),
    "7b-tp4-pp4": (
        128,
        True,
        f"{FULL} --micro-batch-size 1 --global-batch-size 512 --tensor-model-parallel-size 4 "
        "--pipeline-model-parallel-size 4 --decoder-last-pipeline-num-layers 5",
    ),
    "norms-across-heads-and-windows": (
        8,
        True,
        f"{COMMON} --model-preset olmo2-1b --vocab-size 100352 --micro-batch-size 2 --num-layers 6 "
        "--norm-placement both --window-size 511,0 --window-attn-skip-freq 6 "
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "6-layers-without-triton": (8, False, f"{PRO} --micro-batch-size 1 --num-layers 6"),
}


def read(flags: str, processes: int) -> RunConfig:
    return read_args(flags.split(), world_size=processes, device="cuda", check_files=False)


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    """Two at a time, each in its own process."""
    with ThreadPoolExecutor(2) as threads:
        started = {
            name: threads.submit(trace, read(flags, processes), triton=triton)
            for name, (processes, triton, flags) in CASES.items()
        }
        return {name: future.result() for name, future in started.items()}


def arithmetic(name: str) -> tuple[ModelConfig, describe.Layout]:
    """Model and layout as in tools/plan_run.py."""
    processes, triton, flags = CASES[name]
    run = read(flags, processes)
    return describe.with_vocabulary(run), replace(describe.layout_of(run), kernels=triton)


def operations(model: ModelConfig, layout: describe.Layout, stage: int) -> float:
    """FLOPs of a rank's step."""
    tokens = layout.micro_batch * layout.micro_batches * layout.seq_length
    return tokens * describe.flops_of_rank(model, layout, stage)


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_operations_equal_the_arithmetic(traces, name):
    model, layout = arithmetic(name)
    assert traces[name].stage == 0
    assert traces[name].parameters == describe.parameters_of_rank(model, layout, 0)
    assert traces[name].flops == operations(model, layout, 0)


@pytest.mark.parametrize("name", CASES)
def test_operations_of_all_ranks_are_the_models(name):
    model, layout = arithmetic(name)
    stages = [describe.flops_of_rank(model, layout, stage) for stage in range(layout.pipeline)]
    # Without sequence parallelism each tensor parallel rank computes the shortcuts of all tokens.
    again = 0 if layout.sequence_parallel else layout.tensor - 1
    shortcuts = 6 * model.num_layers * 2 * model.hidden_size * model.shortcut_width
    expected = model.flops_per_token(layout.seq_length) + again * shortcuts
    assert layout.tensor * sum(stages) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_memory_is_that_of_the_estimate(traces, name):
    said, seen = footprint.memory_of_stage(*arithmetic(name), 0), traces[name].memory
    for part in ("weights", "gradients", "optimizer"):
        assert seen[part] == pytest.approx(said[part], rel=0.01), part
    assert said["activations"] == pytest.approx(seen["activations"], rel=0.1)
    assert traces[name].update < 0.01 * sum(seen.values())


def test_groups_are_laid_out_as_megatrons(traces):
    """Tensor parallel ranks next to each other, then data, then pipeline."""
    found = traces["1.5b-tp8-sequence-parallel"].groups
    assert found == {"tensor": list(range(8)), "data": list(range(0, 1024, 8)), "pipeline": [0]}
    found = traces["1.5b-pp4-interleaved"].groups
    assert found == {"tensor": [0], "data": list(range(256)), "pipeline": [0, 256, 512, 768]}
    found = traces["7b-tp4-pp4"].groups
    assert found == {"tensor": [0, 1, 2, 3], "data": list(range(0, 32, 4)), "pipeline": [0, 32, 64, 96]}


def test_shapes_are_the_ranks_shards(traces):
    shapes = traces["1.5b-tp8-sequence-parallel"].shapes
    layer = "0.module.decoder.layers.21."
    assert shapes["0.module.embedding.word_embeddings.weight"] == (6000, 2048)
    assert shapes[f"{layer}self_attention.linear_qkv.weight"] == (768, 2048)
    assert shapes[f"{layer}mlp.linear_fc1.weight"] == (1728, 2048)
    assert shapes[f"{layer}mlp.linear_fc2.weight"] == (2048, 864)
    assert shapes[f"{layer}mlp.series_activation.scale"] == (2, 864)
    assert shapes[f"{layer}self_attention.augmented_shortcut.down"] == (64, 2048)
    names = traces["1.5b-pp4-interleaved"].shapes
    assert {name[0] for name in names if ".layers." in name} == {"0", "1"}


def test_last_stage_holds_head_and_loss_and_recomputes():
    flags = (
        f"{FULL} --micro-batch-size 1 --global-batch-size 512 --tensor-model-parallel-size 4 --num-layers 4 "
        "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 3 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    )
    run = read(flags, 128)
    model, layout, last = describe.with_vocabulary(run), describe.layout_of(run), trace(run, rank=64)
    assert last.stage == 1 and last.groups["data"] == list(range(64, 128, 4))
    assert last.flops == operations(model, layout, 1)
    said = footprint.memory_of_stage(model, layout, 1)["activations"]
    assert said == pytest.approx(last.memory["activations"], rel=0.1)


def test_layers_of_transformer_engine_are_refused():
    run = read(f"{PRO} --micro-batch-size 1", 8).but(transformer_impl="transformer_engine")
    with pytest.raises(ValueError, match="--transformer-impl local"):
        trace(run)
