"""The collectives of a step, as predicted from shape and layout and as a run calls them over gloo."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.arguments.parser import read_args
from megatron_ext.config import describe
from megatron_ext.config.presets import preset
from megatron_ext.planning import communication
from tests.functional.test_run import BASE
from tests.helpers.training import _pretrain, flags

OPERATIONS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::send": "send",
}


class Ledger(TorchDispatchMode):
    """Bytes by operation of every collective that is called; small ones (reports, norms) left out."""

    def __init__(self, smallest: int):
        super().__init__()
        self.smallest, self.bytes = smallest, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operation = OPERATIONS.get(function._schema.name)
        if operation is not None and _ranks(args) > 1:
            # The whole tensor: what is gathered is the first argument, what is scattered the second.
            whole = args[1] if operation == "reduce_scatter" else args[0]
            tensors = whole if isinstance(whole, list | tuple) else [whole]
            size = sum(t.numel() * t.element_size() for t in tensors)
            if size >= self.smallest:
                self.bytes[operation] += size
        return function(*args, **(kwargs or {}))


def _ranks(args: tuple) -> int:
    """Size of the process group among an operation's arguments, the first object that is one."""
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    return torch.distributed.ProcessGroup.unbox(boxed).size()


def _counted(argv: list[str], smallest: int) -> dict[str, int]:
    with Ledger(smallest) as ledger:
        _pretrain(argv)
    return dict(ledger.bytes)


MODEL = BASE | dict(
    hidden_size=64, ffn_hidden_size=192, seq_length=64, micro_batch_size=2, global_batch_size=8,
    eval_iters=0, padded_vocab_size=512, train_iters=2,
)  # fmt: skip
CASES = {
    "dp2": (2, {}),
    "dp2-distributed-optimizer": (2, {"use_distributed_optimizer": True}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-sequence-parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2-recompute": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2-interleaved-uneven": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers": 6,
            "num_virtual_stages_per_pipeline_rank": 2,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
    "tp2-pp2-sequence-parallel": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_what_is_predicted(pool, case):
    processes, changes = CASES[case]
    argv = flags(**MODEL | changes)
    run = read_args(argv, world_size=processes, device="cpu")
    model, layout = describe.with_vocabulary(run), describe.layout_of(run)
    smallest = 4000  # bytes: above a micro batch's losses and every report, below the model's
    once, twice = (
        pool.run(processes, _counted, [*argv, "--exit-interval", str(n)], smallest, timeout=120)
        for n in (1, 2)
    )
    for rank in range(processes):
        step = {name: twice[rank][name] - once[rank].get(name, 0) for name in twice[rank]}
        predicted: Counter = Counter()
        for collective in communication.collectives(model, layout, rank // (processes // layout.pipeline)):
            predicted[collective.operation] += collective.times * collective.size
        assert {name: size for name, size in step.items() if size} == pytest.approx(predicted, rel=0.02), rank


def test_ring_factors():
    for operation, factor in {
        "all_reduce": 1.5,
        "all_gather": 0.75,
        "reduce_scatter": 0.75,
        "send": 1,
    }.items():
        assert communication.Collective("data", operation, 8.0, 2, 4).sent == 16 * factor


def test_pipeline_of_one_sends_nothing():
    model = preset("1b-pro")
    assert communication.collectives(model, describe.Layout()) == []
    assert torch.tensor(list(communication.bytes_sent(model, describe.Layout()).values())).sum() == 0
