"""Megatron-Core's configuration objects."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils

from megatron_ext import models
from megatron_ext.arguments.parser import read_args
from megatron_ext.arguments.vocabulary import padded_vocab_size
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.presets import PRESETS
from megatron_ext.models.builder import ddp_config
from megatron_ext.models.config import CUDA_FUSIONS, PanguProConfig, transformer_config
from megatron_ext.training.optimizer import optimizer_config

DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 99"
RUN = f"{DATA} --lr 1e-3 --train-iters 10 --micro-batch-size 2"


def read(flags: str, world_size: int = 1, device: str = "cpu"):
    return read_args(f"{RUN} {flags}".split(), world_size=world_size, device=device)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_makes_a_config(name):
    config = transformer_config(read(f"--model-preset {name}"))
    shape = PRESETS[name]
    assert (config.num_layers, config.ffn_hidden_size) == (shape.num_layers, shape.ffn_hidden_size)
    assert (config.gated_linear_unit, config.activation_func) == (True, F.silu)
    assert (config.series_activation_order, config.augmented_shortcuts) == (
        (2, 1) if shape.has_pi else (0, 0)
    )
    assert config.perform_initialization is False


def test_no_cuda_fusion_on_a_cpu():
    config = transformer_config(read("--model-preset tiny"))
    assert not any(getattr(config, name) for name in CUDA_FUSIONS)


@pytest.mark.parametrize("fused", [None, object()])
def test_fusions_of_packages_that_cannot_be_used_are_off(monkeypatch, fused):
    """Without a usable engine Megatron-Core has no fused rotary embedding; in-place sums need no package."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", fused)
    config = transformer_config(read("--model-preset tiny --bf16 --transformer-impl local", device="cuda"))
    assert config.apply_rope_fusion is (fused is not None)
    assert config.gradient_accumulation_fusion


def test_fusion_that_would_pass_the_series_activation_by_is_off_on_a_gpu():
    flags = "--model-preset tiny --bf16 --transformer-impl local"
    assert not transformer_config(read(flags, device="cuda")).bias_activation_fusion
    plain = read(f"{flags} --series-activation-order 0", device="cuda")
    assert transformer_config(plain).bias_activation_fusion


def test_grouped_queries_only_if_asked_for():
    assert transformer_config(read("--model-preset tiny")).num_query_groups == 4
    flags = "--model-preset tiny --group-query-attention --num-query-groups 2"
    assert transformer_config(read(flags)).num_query_groups == 2


def test_pipeline_and_virtual_stages():
    flags = "--model-preset tiny --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2"
    config = transformer_config(read(f"{flags} --global-batch-size 8", 2))
    assert config.virtual_pipeline_model_parallel_size == 2
    assert (config.pipeline_dtype, config.overlap_p2p_comm, config.batch_p2p_comm) == (
        torch.float32,
        True,
        False,
    )


def test_optimizer_and_gradients():
    run = read("--model-preset tiny --bf16 --use-distributed-optimizer --adam-beta2 0.95 --clip-grad 0.5")
    optimizer, ddp = optimizer_config(run), ddp_config(run)
    assert (optimizer.lr, optimizer.adam_beta2, optimizer.clip_grad) == (1e-3, 0.95, 0.5)
    assert (optimizer.bf16, optimizer.params_dtype) == (True, torch.bfloat16)
    assert optimizer.use_distributed_optimizer and ddp.use_distributed_optimizer
    assert ddp.grad_reduce_in_fp32


@pytest.mark.parametrize(
    ("true_size", "parallel", "expected"),
    [(257, 1, 384), (257, 2, 384), (48000, 1, 48000), (48000, 2, 48000), (48000, 8, 48000), (257, 5, 640)],
)
def test_padded_vocabulary_does_not_depend_on_the_layout(true_size, parallel, expected):
    run = read("--model-preset tiny")
    run.parallel.tensor_model_parallel_size = parallel
    assert padded_vocab_size(true_size, run) == expected


def test_padded_vocabulary_that_was_asked_for():
    run = read("--model-preset tiny --padded-vocab-size 512")
    assert padded_vocab_size(257, run) == 512
    with pytest.raises(ValueError, match="must be at least the tokenizer's 600"):
        padded_vocab_size(600, run)


def test_every_field_of_a_model_reaches_it():
    """A field that Megatron-Core's configuration, ours or the builder does not take would be silent."""
    taken = {field.name for field in dataclasses.fields(PanguProConfig)}
    for path in Path(models.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "run.model":
                taken.add(node.attr)
    assert {field.name for field in dataclasses.fields(ModelConfig)} - taken == set()
