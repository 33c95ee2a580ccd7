"""Weights that Transformer Engine keeps in FP8, in a checkpoint: as numbers that anyone can read."""

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.fp8_utils import is_float8tensor
from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

from megatron_ext.checkpoint import load_checkpoint, save, save_checkpoint
from tests.helpers.parallel import Layout
from tests.te import kernels
from tests.te.cases.machines import run


def in_fp8(weight: torch.Tensor) -> torch.nn.Parameter:
    """The weight as ``fp8_model_init`` leaves it."""
    scale = weight.abs().max() / 448
    data = (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8)
    tensor = Float8Tensor(
        shape=weight.shape, dtype=weight.dtype, data=data, fp8_scale_inv=scale.reshape(1),
        fp8_dtype=kernels.DType.kFloat8E4M3, requires_grad=True,
    )  # fmt: skip
    return torch.nn.Parameter(tensor)


def saved_and_read(folder: str) -> tuple[dict, dict, int, int]:
    """Weights as FP8 has them, as local layers read them; how many were in FP8, how many in what is saved."""
    first = run(Layout(), True)
    model, count = first.model[0].module, 0
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's linear layers
            module.weight = in_fp8(module.weight.detach())
            count += 1
    expected = {name: p.float().detach().clone() for name, p in model.named_parameters()}
    planned = save._sharded_part([model], None, first.config.checkpoint, rng_states=False)
    left = sum(is_float8tensor(getattr(value, "data", None)) for value in nested_values(planned))
    parts = dict(model=[model], optimizer=None, scheduler=None, run=first.config)
    save_checkpoint(folder, 1, run_state={}, **parts).finish()
    second = run(Layout(), False, ("--load", folder, "--no-load-optim"))
    load_checkpoint(folder, model=second.model, run=second.config)
    found = second.model[0].module.named_parameters()
    return expected, {name: p.detach() for name, p in found}, count, left


def test_a_checkpoint_holds_no_fp8(pool, tmp_path):
    ((expected, found, count, left),) = pool.run(Layout(), saved_and_read, str(tmp_path))
    assert (count, left) == (16, 0)  # from 2.16 on a copy on the CPU would still be in FP8
    assert all(torch.equal(found[name], value) for name, value in expected.items())
