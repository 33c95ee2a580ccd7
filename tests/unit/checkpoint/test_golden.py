"""A checkpoint written by Megatron-LM itself is loaded completely."""

import shutil

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_ext.checkpoint import load_checkpoint
from megatron_ext.checkpoint.content import unwrap
from megatron_ext.checkpoint.safe import load_metadata
from tests.helpers.parallel import Layout
from tests.unit.checkpoint.tiny import Run, arguments

FLAGS = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --lr 2e-3 --min-lr 2e-4
    --vocab-size 256 --micro-batch-size 2
"""


def test_upstreams_checkpoint(saved_once, shared, tmp_path):
    folder = shutil.copytree(shared / "reference" / "golden" / "gqa_1p" / "checkpoint", tmp_path / "golden")
    run = Run(arguments(Layout(), *FLAGS.split(), pi="").but(padded_vocab_size=384))
    found = load_checkpoint(folder, **run.parts)

    assert found.iteration == 10 and found.optimizer_loaded and found.rng_loaded
    assert found.run_state["consumed_train_samples"] == 40
    assert found.run_state["num_floating_point_operations_so_far"] == 1918894080.0
    assert run.scheduler.num_steps == 40
    groups = run.optimizer.param_groups
    assert [group["step"] for group in groups] == [10, 10]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]

    expected = {
        key: torch.empty(value.size)
        for key, value in load_metadata(folder / "iter_0000010").state_dict_metadata.items()
        if hasattr(value, "size")
    }
    load(expected, storage_reader=FileSystemReader(folder / "iter_0000010"), no_dist=True)
    state = run.optimizer.chained_optimizers[0].optimizer.state
    for name, parameter in unwrap(run.model[0]).named_parameters():
        key, layer = _upstreams_name(name)
        for prefix, tensor in (
            ("", parameter),
            ("optimizer.state.exp_avg.", state[parameter]["exp_avg"]),
            ("optimizer.state.exp_avg_sq.", state[parameter]["exp_avg_sq"]),
        ):
            value = expected[prefix + key]
            assert torch.equal(tensor, value if layer is None else value[layer]), prefix + name


def _upstreams_name(name: str) -> tuple[str, int | None]:
    layers = [int(part) for part in name.split(".") if part.isdigit()]
    key = ".".join(part for part in name.split(".") if not part.isdigit())
    key = key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"), layers[0] if layers else None
