"""tools/verify_layout.py: right layouts are the same, and each of twelve planted faults is found."""

import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.models.builder import unwrap
from megatron_ext.training import distributed, layout_check
from tests.conftest import REPOSITORY
from tests.helpers.training import flags

BASE = dict(
    mock_data=True, tokenizer_type="NullTokenizer", vocab_size=255, num_layers=2, hidden_size=32,
    ffn_hidden_size=64, num_attention_heads=4, seq_length=16, max_position_embeddings=16,
    position_embedding_type="rope", normalization="RMSNorm", swiglu=True, disable_bias_linear=True,
    series_activation_order=2, augmented_shortcuts=1, augmented_shortcut_reduction=8, pangu_init="random",
    micro_batch_size=2, global_batch_size=8, train_iters=6, lr=1e-2, num_workers=0,
    save="never-written", tensorboard_dir="never-written",
)  # fmt: skip
TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
DP = {"global_batch_size": 8}
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
STEPS = 2


def recorded(folder: str, layout: dict, options: dict, fault: Callable | None = None) -> None:
    """Record on the processes that are there."""
    run = layout_check.settings(flags(**BASE | layout), None, one_process=not layout, **options)
    Path(folder).mkdir(exist_ok=True)
    with FAULTS[fault]() if fault else mock.patch.dict({}):
        layout_check.record(run, Path(folder), STEPS)
    distributed.finalize()


def alone(folder: str) -> None:
    """Record one process, as the tool does for a layout of two."""
    run = layout_check.settings(flags(**BASE | TP), 2, one_process=True)
    Path(folder).mkdir()
    layout_check.record(run, Path(folder), STEPS)
    distributed.finalize()


@pytest.fixture(scope="module")
def reference(pool, tmp_path_factory) -> layout_check.Record:
    folder = tmp_path_factory.mktemp("reference") / "one"
    pool.run(1, alone, str(folder))
    return layout_check.Record(folder)


def differences(pool, folder: Path, reference, layout: dict, **more) -> list[layout_check.Difference]:
    pool.run(2, recorded, str(folder), layout, more.pop("options", {}), **more, timeout=120)
    return layout_check.compare(reference, layout_check.Record(folder))


@pytest.mark.parametrize("layout", [SP, PP, DP | SHARDED], ids=["tp2-sp", "pp2", "dp2-sharded-overlapped"])
def test_right_layouts_are_the_same(pool, tmp_path, reference, layout):
    assert differences(pool, tmp_path / "many", reference, layout) == []
    names = layout_check.Record(tmp_path / "many").shards(1)
    assert {"gradient embedding.word_embeddings.weight", "parameter decoder.final_layernorm.weight"} <= {
        *names
    }


def test_copies_agree_with_dropout(pool, tmp_path):
    pool.run(2, recorded, str(tmp_path / "many"), TP, {"dropout": True})
    assert layout_check.replicas(layout_check.Record(tmp_path / "many")) == []


@contextmanager
def built(change: Callable[[list], object]) -> Iterator[None]:
    """``change`` gets the model as soon as it is built."""
    build = layout_check.build_trainer

    def changed(run):
        trainer = build(run)
        with torch.no_grad():
            change([unwrap(chunk) for chunk in trainer.model], trainer.model)
        return trainer

    with mock.patch.object(layout_check, "build_trainer", changed):
        yield


def swap_shards(chunks, _model) -> None:
    weight = chunks[0].decoder.layers[0].mlp.linear_fc2.weight
    group = parallel_state.get_tensor_model_parallel_group()
    both = [torch.empty_like(weight) for _ in range(2)]
    torch.distributed.all_gather(both, weight.detach(), group=group)
    weight.copy_(both[1 - group.rank()])


def scale_by_one(_chunks, model) -> None:
    for chunk in model:
        for buffer in chunk.buffers:
            buffer.gradient_scaling_factor = 1.0
            for bucket in buffer.buckets:
                bucket.gradient_scaling_factor = 1.0


def begin_one_too_early(chunks, _model) -> None:
    if parallel_state.get_tensor_model_parallel_rank():
        chunks[0].embedding.word_embeddings.vocab_start_index -= 1
        chunks[0].embedding.word_embeddings.vocab_end_index -= 1


def unmark_shortcuts(chunks, _model) -> None:
    for name, parameter in chunks[0].named_parameters():
        if "augmented_shortcut" in name:
            parameter.sequence_parallel = False


def seed_each_rank(run) -> None:
    SEED(run)
    torch.manual_seed(parallel_state.get_tensor_model_parallel_rank())


def halved(receive):
    def received(*args, **kwargs):
        got = receive(*args, **kwargs)
        if isinstance(got, list):
            return [tensor if tensor is None else tensor / 2 for tensor in got]
        return got if got is None else got / 2

    return received


CORE, SEED = "megatron.core", distributed.seed


def backward_halved():
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    return mock.patch.multiple(
        P2PCommunicator,
        recv_backward=halved(P2PCommunicator.recv_backward),
        send_forward_recv_backward=halved(P2PCommunicator.send_forward_recv_backward),
    )


def nothing(*args, **kwargs):
    return None


FINALIZE = f"{CORE}.distributed.finalize_model_grads"
FAULTS: dict[str, Callable] = {
    "norms not reduced": lambda: mock.patch(
        f"{FINALIZE}._allreduce_non_tensor_model_parallel_grads", nothing
    ),
    "tied embedding not summed": lambda: mock.patch(f"{FINALIZE}._allreduce_embedding_grad", nothing),
    "shards swapped": lambda: built(swap_shards),
    "gradients summed over data": lambda: built(scale_by_one),
    "dropout not synchronised": lambda: mock.patch.object(distributed, "seed", seed_each_rank),
    "ranks read the same samples": lambda: mock.patch(
        "megatron_ext.data.loader._data_parallel", lambda *_: (0, 2)
    ),
    "row output not summed": lambda: mock.patch(
        f"{CORE}.tensor_parallel.layers.reduce_from_tensor_model_parallel_region", lambda x, group=None: x
    ),
    "gradient halved between stages": backward_halved,
    "parameters not gathered": lambda: mock.patch(
        f"{CORE}.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.start_param_sync", nothing
    ),
    "copies counted twice in the norm": lambda: mock.patch(
        f"{CORE}.tensor_parallel.param_is_not_tensor_parallel_duplicate", lambda *_, **__: True
    ),
    "vocabulary begins too early": lambda: built(begin_one_too_early),
    "shortcuts not reduced": lambda: built(unmark_shortcuts),
}
CASES = {
    "norms not reduced": (SP, "copies"),
    "tied embedding not summed": (PP, "copies"),
    "shards swapped": (TP, "scalar"),
    "gradients summed over data": (DP, "scalar"),
    "ranks read the same samples": (DP, "scalar"),
    "row output not summed": (TP, "scalar"),
    "gradient halved between stages": (PP, "scalar"),
    "parameters not gathered": ({"use_distributed_optimizer": True} | DP, "copies"),
    "copies counted twice in the norm": (TP, "scalar"),
    "vocabulary begins too early": (TP, "scalar"),
    "shortcuts not reduced": (SP, "copies"),
}


@pytest.mark.parametrize("fault", CASES)
def test_planted_faults_are_found(pool, tmp_path, reference, fault):
    layout, kind = CASES[fault]
    found = differences(pool, tmp_path / "many", reference, layout, fault=fault)
    assert kind in {one.kind for one in found}, found


def test_unsynchronised_dropout_is_found_without_a_reference(pool, tmp_path):
    fault = "dropout not synchronised"
    pool.run(2, recorded, str(tmp_path / "many"), TP, {"dropout": True}, fault=fault)
    found = layout_check.replicas(layout_check.Record(tmp_path / "many"))
    assert any("norm" in one.what for one in found), found


def test_the_tool_compares_and_refuses(pool, tmp_path, reference, capsys):
    tool = runpy.run_path(str(REPOSITORY / "tools" / "verify_layout.py"))["main"]
    differences(pool, tmp_path / "many", reference, TP, fault="copies counted twice in the norm")
    assert tool(["--compare", str(reference.folder), str(reference.folder)]) == 0
    assert "THE SAME" in capsys.readouterr().out
    assert tool(["--compare", str(reference.folder), str(tmp_path / "many")]) == 1
    out = capsys.readouterr().out
    assert "step 1: norm of the gradients differs by" in out and "NOT THE SAME" in out
    (tmp_path / "many" / "rank_1.json").unlink()
    assert tool(["--compare", str(reference.folder), str(tmp_path / "many")]) == 1
    assert "not a whole record" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool(["--nproc-per-node", "1", "--"])
    assert "a layout has at least 2 processes" in capsys.readouterr().err
