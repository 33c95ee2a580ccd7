"""Transformer Engine's options: shapes, recipes, errors that say what to install, and the config."""

import sys

import pytest
import torch

from megatron_ext.arguments.of_checkpoint import arguments_of as inference_arguments
from megatron_ext.arguments.parser import read_args
from megatron_ext.arguments.validate import engine as rules
from megatron_ext.config import RunConfig
from megatron_ext.config.presets import PRESETS
from megatron_ext.models.config import transformer_config
from megatron_ext.platform import engine
from megatron_ext.training.batch import Batch, of_context_rank
from megatron_ext.training.optimizer import optimizer_config
from tests.unit.arguments.test_validate import problems_of

RUN = (
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 99 --lr 1e-3 --train-iters 10 "
    "--micro-batch-size 2"
)
SHAPE = (
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 512 --num-attention-heads 4 --seq-length 256 "
    "--max-position-embeddings 512"
)
FP8 = f"{RUN} {SHAPE} --bf16 --fp8-format hybrid --fp8-recipe tensorwise"

#: (flags added to FP8, processes, part of the one problem)
BROKEN = [
    ("--hidden-size 124 --kv-channels 32", 1, "--hidden-size 124 must be a multiple of 16: 112 or 128"),
    (
        "--tensor-model-parallel-size 2 --ffn-hidden-size 520",
        2,
        "--ffn-hidden-size 520 must be a multiple of 16 on each of --tensor-model-parallel-size 2: 512 or",
    ),
    ("--ffn-hidden-size 8", 1, "--ffn-hidden-size 8 must be a multiple of 16: 16"),
    ("--kv-channels 20 --num-attention-heads 6", 1, "the 120 query channels of 6 heads of 20"),
    (
        "--micro-batch-size 1 --seq-length 250",
        1,
        "1 x --seq-length 250 = 250 tokens must be a multiple of 16",
    ),
    ("--micro-batch-size 1 --seq-length 200", 1, "= 200 tokens must be a multiple of 16"),
    (
        "--tensor-model-parallel-size 4 --sequence-parallel --micro-batch-size 1 --seq-length 240",
        4,
        "on each of the 4 ranks that share the sequence: --seq-length 256",
    ),
    ("--fp8-recipe mxfp8 --ffn-hidden-size 528", 1, "multiple of 32: 512 or 544"),
    ("--fp8-recipe blockwise --hidden-size 192 --kv-channels 32", 1, "multiple of 128: 128 or 256"),
    ("--fp8-recipe delayed --first-last-layers-bf16", 1, "does not go with --fp8-recipe delayed"),
    ("--first-last-layers-bf16 --num-layers-at-end-in-bf16 5", 1, "exceeds the 4 layers"),
    ("--fp8-param-gather", 1, "--fp8-param-gather needs --use-distributed-optimizer"),
    (
        "--fp8-param-gather --use-distributed-optimizer --fp8-recipe mxfp8",
        1,
        "--fp8-param-gather does not go with --fp8-recipe mxfp8",
    ),
    ("--cuda-graph-impl transformer_engine", 1, "use --cuda-graph-impl local"),
    ("--cuda-graph-impl local --recompute-activations", 1, "does not go with recomputation"),
    ("--cuda-graph-warmup-steps 2", 1, "--cuda-graph-warmup-steps cannot take effect"),
    ("--reset-attention-mask --cuda-graph-impl local", 1, "does not go with --cuda-graph-impl"),
    ("--attention-backend local", 1, "switches every backend of Transformer Engine off"),
    ("--no-fp8-wgrad", 1, "--no-fp8-wgrad is known to Megatron-LM"),
    ("--context-parallel-size 2 --cp-comm-type p2p a2a", 2, "--cp-comm-type takes one value"),
    ("--context-parallel-size 2 --reset-attention-mask", 2, "does not go with --context-parallel-size"),
    ("--context-parallel-size 2 --window-size 9,0", 2, "--window-size does not go with --context-parallel"),
    (
        "--context-parallel-size 2 --cp-comm-type a2a --group-query-attention --num-query-groups 1",
        2,
        "1 heads or query groups are not divisible by",
    ),
]


@pytest.mark.parametrize(("flags", "world_size", "expected"), BROKEN)
def test_each_rule_is_broken_alone(flags, world_size, expected):
    (problem,) = problems_of(f"{FP8} {flags}", world_size, "cuda")
    assert expected in problem


@pytest.mark.parametrize(
    "flags",
    [
        "--hidden-size 112",
        "--hidden-size 256 --fp8-recipe blockwise",
        "--ffn-hidden-size 544 --fp8-recipe mxfp8",
        "--tensor-model-parallel-size 4 --sequence-parallel --micro-batch-size 1 --seq-length 256",
    ],
)
def test_the_sizes_that_errors_name_are_legal(flags):
    assert problems_of(f"{FP8} {flags}", 4 if "parallel" in flags else 1, "cuda") == []


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("pangu")])
@pytest.mark.parametrize("recipe", engine.RECIPES)
def test_presets_suit_every_recipe(name, recipe):
    line = f"{RUN} --model-preset {name} --bf16 --fp8-format e4m3 --fp8-recipe {recipe}"
    assert problems_of(line, 1, "cuda") == []


def test_graphs_and_context_parallelism_are_taken():
    line = (
        f"{RUN} {SHAPE} --bf16 --cuda-graph-impl local --cuda-graph-warmup-steps 2 --context-parallel-size 2"
    )
    assert problems_of(line, 2, "cuda") == []
    assert len(problems_of(line, 2, "cpu")) == 2


def test_flags_reach_the_configuration(single_process):
    line = (
        f"{FP8} --use-distributed-optimizer --fp8-param-gather --first-last-layers-bf16 "
        "--num-layers-at-start-in-bf16 2 --num-layers-at-end-in-bf16 1 --cuda-graph-impl local"
    )
    run = read_args(line.split(), world_size=1, device="cuda")
    assert run.layers.transformer_impl == "transformer_engine"
    config = transformer_config(run)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", "tensorwise", True)
    assert config.first_last_layers_bf16 and config.cuda_graph_impl == "local"
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 1)
    assert config.params_dtype == torch.bfloat16
    assert optimizer_config(run).fp8_recipe == "tensorwise"


@pytest.mark.parametrize("kind", ["p2p", "all_gather", "a2a"])
def test_ways_of_context_parallelism_are_spelled_as_the_engine_does(kind):
    """transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py knows these words."""
    line = f"{RUN} {SHAPE} --bf16 --context-parallel-size 2 --cp-comm-type {kind}"
    run = read_args(line.split(), world_size=2, device="cuda")
    assert transformer_config(run).cp_comm_type == kind


@pytest.mark.parametrize(
    ("version", "flags", "refused"),
    [
        ("2.10.0", "--bf16", False),
        ("2.10.0", "", True),
        ("2.10.0", "--bf16 --attention-backend unfused", True),
        ("2.11.0", "", False),
        (None, "", False),  # checked for a machine that is not this one
    ],
)
def test_documents_need_an_attention_that_takes_them(monkeypatch, version, flags, refused):
    monkeypatch.setattr(engine, "version_of", lambda package: version)
    found = problems_of(f"{RUN} {SHAPE} --reset-attention-mask {flags}", 1, "cuda")
    assert [p.split(" needs ")[0] for p in found] == ["--reset-attention-mask"] * refused


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "expected"),
    [
        (
            "delayed",
            (8, 0),
            (12, 8),
            "a GPU of compute capability 8.9 (Ada, Hopper or newer), this one has 8.0",
        ),
        ("mxfp8", (9, 0), (12, 8), "Blackwell"),
        ("mxfp8", (12, 0), (12, 8), "compute capability 10.0"),
        ("mxfp8", (10, 0), (12, 8), None),
        ("blockwise", (8, 9), (12, 9), "Hopper"),
        ("blockwise", (9, 0), (12, 8), "a torch built for CUDA 12.9 or newer, this one is for 12.8"),
        ("blockwise", (9, 0), (13, 0), None),
        ("delayed", (9, 0), (12, 1), None),
    ],
)
def test_recipes_need_gpus_and_cuda(recipe, capability, cuda, expected):
    run = RunConfig.of({"fp8": "hybrid", "fp8_recipe": recipe, "gpu": (capability, cuda)})
    problems = list(rules.recipe_suits_the_machine(run, {}))
    assert (expected is None) == (problems == [])
    if expected:
        assert problems[0].startswith(f"--fp8-recipe {recipe} needs ") and expected in problems[0]


@pytest.fixture
def engine_module(monkeypatch, tmp_path):
    """Make a package of that name, version and content, seen by the checks as Transformer Engine."""

    def make(version: str | None, content: str) -> None:
        engine.problem.cache_clear()
        monkeypatch.setattr("megatron_ext.platform.engine.version_of", lambda package: version)
        (tmp_path / "transformer_engine").mkdir(exist_ok=True)
        (tmp_path / "transformer_engine" / "__init__.py").touch()
        (tmp_path / "transformer_engine" / "pytorch.py").write_text(content)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)  # a CPU has none

    yield make
    engine.problem.cache_clear()
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("version", "content", "expected"),
    [
        (None, "", "the package is not installed: pip install"),
        ("2.8.0", "", "2.8 is too old, >=2.9,<2.12 is needed: pip install"),
        ("2.11.0", "raise ImportError('libcudnn.so.9')", "its import fails (ImportError: libcudnn.so.9)"),
        ("2.11.0", "raise OSError('libcuda.so.1')", "its import fails (OSError: libcuda.so.1)"),
        ("2.11.0", "", None),
    ],
)
def test_an_engine_that_cannot_be_used_says_what_to_install(engine_module, version, content, expected):
    engine_module(version, content)
    problem = engine.problem(True)
    assert problem is None if expected is None else expected in problem
    run = RunConfig.of({"transformer_impl": "transformer_engine", "engine_problem": problem})
    refusals = list(rules.engine_is_there(run, {}))
    assert len(refusals) == bool(expected) and all(expected in refusal for refusal in refusals)


def test_the_engine_is_not_imported_without_a_gpu(engine_module):
    engine_module("2.11.0", "raise SystemExit('imported')")
    assert engine.problem(False) == "it needs a GPU"


def test_versions():
    assert engine.parse_version("2.11.0+cu12") == (2, 11)
    assert engine.parse_version("1.9rc1") == (1, 9)
    assert engine.parse_version("unknown") == (0, 0)  # older than all that is asked for


def test_context_ranks_share_the_sequence():
    """Each token is on one rank; rank 0 has the first and the last piece, its neighbour the next ones."""
    size, length = 2, 16
    ids = torch.arange(2 * length).view(2, length)
    whole = Batch(ids, ids + 1, torch.ones(2, length), ids % length, None, torch.tensor([5, 6]))
    parts = [of_context_rank(whole, rank, size) for rank in range(size)]
    assert parts[0].position_ids[0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert parts[1].position_ids[0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    for part in parts:
        assert torch.equal(part.labels, part.tokens + 1)
        assert part.loss_mask.shape == (2, length // size)
        assert torch.equal(part.sample_ids, whole.sample_ids)
    assert of_context_rank(whole, 0, 1) is whole


def test_a_checkpoint_of_such_a_run_is_read_for_inference(single_process):
    """FP8, graphs, an uneven pipeline and the like belong to the training job, not to the model."""
    line = (
        f"{FP8} --use-distributed-optimizer --fp8-param-gather --first-last-layers-bf16 "
        "--cuda-graph-impl local --context-parallel-size 2 --cp-comm-type all_gather "
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 3"
    )
    saved = read_args(line.split(), world_size=4, device="cuda")
    config = transformer_config(inference_arguments(saved.flat(), "folder"))
    assert (config.fp8, config.fp8_param, config.cuda_graph_impl) == (None, False, "none")
    assert config.num_layers_in_first_pipeline_stage is None and config.bf16
