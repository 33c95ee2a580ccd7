"""Muon in a run: every layout continues one checkpoint alike, resumes bit for bit, and is refused by name.

TRACE_ITERATIONS=30 runs the long form.
"""

import os

import pytest

from tests.functional.test_run import BASE
from tests.helpers.training import flags, losses, pretrain

ITERATIONS = int(os.environ.get("TRACE_ITERATIONS", 6))
MUON = BASE | dict(
    optimizer="muon", muon_use_nesterov=True, muon_extra_scale_factor=0.2, group_query_attention=True,
    num_query_groups=2, num_layers=4, train_iters=ITERATIONS, eval_iters=0, lr=1e-2, pangu_init="random",
)  # fmt: skip
TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tp2-sp": (2, TP | {"sequence_parallel": True}),
    "pp2": (2, PP),
    "dp2": (2, {"overlap_grad_reduce": True}),
    "dp2-layer-wise": (2, {"optimizer": "dist_muon"}),
    "tp2-pp2": (4, TP | PP),
}


def run(pool, processes: int = 1, **changes) -> list[float]:
    return losses(pretrain(pool, processes, flags(**MUON | changes)))


@pytest.fixture(scope="module")
def whole(pool, tmp_path_factory):
    """A run of one process that saved half-way: its folder and its losses after that."""
    folder = tmp_path_factory.mktemp("muon")
    trace = run(pool, save=folder, save_interval=ITERATIONS // 2)
    return folder, trace[ITERATIONS // 2 :]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_continues_alike(pool, whole, layout):
    processes, changes = LAYOUTS[layout]
    folder, expected = whole
    trace = run(pool, processes, **changes, load=folder, ckpt_step=ITERATIONS // 2)
    assert trace == pytest.approx(expected, rel=1e-5)


def test_resumed_is_uninterrupted(pool, whole):
    folder, expected = whole
    assert run(pool, load=folder, ckpt_step=ITERATIONS // 2) == expected


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_layer_wise_states_are_read_by_one_process(pool, tmp_path, precision):
    half = ITERATIONS // 2
    trace = run(pool, 2, optimizer="dist_muon", save=tmp_path, save_interval=half, **precision)
    found = run(pool, load=tmp_path, ckpt_step=half, **precision)
    assert found == pytest.approx(trace[half:], rel=2e-3 if precision else 1e-5)
    again = run(pool, 2, optimizer="dist_muon", load=tmp_path, ckpt_step=half, **precision)
    assert again == trace[half:]


def test_blocks_are_another_update(pool, whole):
    """Orthogonalizing each rank's shard, Megatron-LM's default, depends on the layout."""
    folder, expected = whole
    words = dict(load=folder, ckpt_step=ITERATIONS // 2, muon_tp_mode="blockwise")
    assert run(pool, 2, **TP, **words) != pytest.approx(expected, rel=1e-4)
    assert run(pool, **words) == expected


@pytest.mark.parametrize(
    "words, message",
    [
        ("--use-distributed-optimizer", "--use-distributed-optimizer cuts them: --optimizer dist_muon"),
        (
            "--muon-tp-mode distributed",
            "--muon-tp-mode distributed is not supported here; duplicated computes",
        ),
        ("--optimizer adam", "cannot take effect: needs --optimizer muon or dist_muon"),
    ],
)
def test_refusals(words, message):
    from megatron_ext.arguments.parser import CommandLineError, read_args

    with pytest.raises(CommandLineError) as problems:
        read_args([*flags(**MUON), *words.split()], world_size=2, device="cpu", check_files=False)
    assert message in str(problems.value)
