"""One process == TP x PP x DP: the loss, the norm and the gradient of every parameter.

Silent wrong gradients hide in compositions of parallelism; a loss trace alone does not show them.
"""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_ext.kernels.documents import document_starts
from megatron_ext.models.builder import unwrap, wrap_for_training
from megatron_ext.models.initialization import shards
from megatron_ext.training.batch import LossCounter
from megatron_ext.training.step import forward_backward
from tests.helpers.models import (
    SEQUENCE,
    VOCABULARY,
    model_arguments,
    positions,
    small_config,
    small_model,
    tokens,
)
from tests.helpers.parallel import Layout

MICROBATCHES, SAMPLES = 4, 2
#: Ids below this end documents, of 12 tokens on average.
ENDS = VOCABULARY // 12


def microbatches(seed: int, documents: bool):
    """This data parallel rank's part of four microbatches that are independent of the layout."""
    rank = parallel_state.get_data_parallel_rank()
    for index in range(rank, MICROBATCHES, parallel_state.get_data_parallel_world_size()):
        ids = tokens(SAMPLES, seed + index, SEQUENCE + 1)
        mask = torch.ones(SAMPLES, SEQUENCE)
        yield {
            "tokens": ids[:, :-1],
            "labels": ids[:, 1:],
            "loss_mask": mask,
            "position_ids": positions(ids[:, :-1]),
        } | ({"document_starts": document_starts(ids[:, :-1] < ENDS)} if documents else {})


def gradients(
    tied: bool,
    random_pi: bool,
    overlap: bool = False,
    sharded: bool = False,
    documents: bool = False,
    **config_changes,
) -> tuple[float | None, list, float]:
    """Loss of the step, (name, offset, gradient) of every shard here, and this rank's share of the norm.

    ``sharded``: gradients are reduced as for the distributed optimizer.
    """
    values = {"num_layers": 4, "pangu_init": "random" if random_pi else "identity"}
    config = small_config(**values | {"gradient_accumulation_fusion": True} | config_changes)
    chunks = small_model(config, tied=tied)
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=overlap, use_distributed_optimizer=sharded)
    model = wrap_for_training(chunks, config, ddp)
    config.finalize_model_grads_func = finalize_model_grads
    for chunk in model:
        chunk.zero_grad_buffer()
    run = model_arguments()
    run.data.seq_length, run.training.micro_batch_size = SEQUENCE, SAMPLES
    sums = forward_backward(
        [microbatches(7, documents) for _ in model],
        model,
        run,
        LossCounter(),
        forward_only=False,
        num_microbatches=MICROBATCHES // parallel_state.get_data_parallel_world_size(),
    )
    if sharded:
        _gather_reduced_shards(model)
    loss = None if sums is None else (sums[0] / sums[1]).item()
    return loss, _gradient_shards(model), _counted_squares(model)


def _gather_reduced_shards(model) -> None:
    """Gather every rank's gradients: after the reduction each rank holds one shard of a bucket."""
    group, rank = parallel_state.get_data_parallel_group(), parallel_state.get_data_parallel_rank()
    buckets = [bucket for chunk in model for buffer in chunk.buffers for bucket in buffer.buckets]
    for bucket in buckets:
        share = bucket.grad_data.chunk(group.size())[rank].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data, share, group=group)


def _counted_squares(model) -> float:
    """Sum of squares of the gradients that Megatron-Core counts on this rank, for the norm."""
    return sum(
        parameter.main_grad.double().square().sum().item()
        for chunk in model
        for parameter in chunk.parameters()
        if param_is_not_tensor_parallel_duplicate(parameter)
        and param_is_not_shared(parameter)
        and parallel_state.get_data_parallel_rank() == 0
    )


def _gradient_shards(model) -> list[tuple[str, tuple, torch.Tensor]]:
    found = []
    for chunk in map(unwrap, model):
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)  # the checkpoint's view of weights, of gradients
        found += [(shard.key, shard.global_offset, shard.data.clone()) for shard in shards(chunk)]
    return found


def assemble(ranks: list, reference: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Full gradients from the shards of all ranks; replicas must be equal."""
    full = {name: torch.full_like(value, float("nan")) for name, value in reference.items()}
    for _, found, _ in ranks:
        for name, offset, value in found:
            window = full[name][tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))]
            if not window.isnan().any():
                torch.testing.assert_close(window, value, rtol=1e-6, atol=1e-8, msg=f"replicas of {name}")
            window.copy_(value)
    return full


LAYOUTS = {
    "tp2": (Layout(tp=2), {}),
    "tp2-sequence-parallel": (Layout(tp=2), {"sequence_parallel": True}),
    "pp2": (Layout(pp=2), {}),
    "pp2-interleaved": (Layout(pp=2, vpp=2), {}),
    "dp2": (Layout(dp=2), {}),
    "dp2-overlap": (Layout(dp=2), {"overlap": True}),
    "tp2-separate-weight-gradients": (Layout(tp=2), {"gradient_accumulation_fusion": False}),
    "dp2-distributed-optimizer": (Layout(dp=2), {"sharded": True}),
    "tp2-pp2-dp2-sp": (Layout(tp=2, pp=2, dp=2), {"sequence_parallel": True, "sharded": True}),
}
OPTIONS = {
    "plain": {"series_activation_order": 0, "augmented_shortcuts": 0, "random_pi": False, "tied": False},
    "pi": {"random_pi": True, "tied": False},
    "pi-tied-qknorm": {"random_pi": True, "tied": True, "qk_layernorm": True},
    "other-makers": {
        "random_pi": True,
        "documents": True,
        "tied": True,
        "qk_layernorm": True,
        "qk_layernorm_across_heads": True,
        "norm_placement": "both",
        "layernorm_zero_centered_gamma": True,
        "no_rope_freq": [0, 0, 1, 0],
        "window_size": (9, 0),
        "window_attn_skip_freq": [1, 1, 0, 1],
        "window_rotary_base": 500,
        "softmax_scale": 0.2,
        "embedding_multiplier": 4.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
}


@pytest.fixture(scope="module")
def references(pool) -> dict:
    """Loss and full gradients of each option in one process."""
    found = {}
    for name, options in OPTIONS.items():
        [(loss, one, squares)] = pool.run(Layout(), gradients, **options)
        full = {}
        for key, offset, value in one:
            full[key] = torch.cat([full[key], value]) if key in full else value  # gate and up of fc1
            assert len(offset) == value.dim()
        found[name] = loss, full, squares
    return found


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(pool, references, layout, option):
    shape, changes = LAYOUTS[layout]
    if shape.world_size == 8 and option == "plain":
        pytest.skip("eight processes run with the pi modules on")
    ranks = pool.run(shape, gradients, **OPTIONS[option], **changes)
    loss, full, squares = references[option]
    assert sum(mine for _, _, mine in ranks) == pytest.approx(squares, rel=1e-5)
    assert [value for value, _, _ in ranks if value is not None][-1] == pytest.approx(loss, rel=2e-6)
    for name, value in assemble(ranks, full).items():
        scale = full[name].abs().max().item()
        torch.testing.assert_close(
            value, full[name], rtol=2e-4, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("option", ["pi", "other-makers"])
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ],
    ids=["selective", "full"],
)
def test_recomputation_changes_nothing(pool, references, recompute, option):
    ranks = pool.run(Layout(tp=2), gradients, **OPTIONS[option], **recompute)
    loss, full, _ = references[option]
    assert ranks[0][0] == pytest.approx(loss, rel=2e-6)
    for name, value in assemble(ranks, full).items():
        torch.testing.assert_close(value, full[name], rtol=2e-4, atol=2e-5 * full[name].abs().max().item())
