"""Transformer Engine's layers beside the local ones: the same model, the same step."""

import pytest
import torch
from megatron.core.tensor_parallel.layers import _MODEL_PARALLEL_ATTRIBUTE_DEFAULTS

from megatron_ext.models.builder import build_model, unwrap
from megatron_ext.models.config import transformer_config
from tests.helpers.parallel import Layout
from tests.te.cases.machines import gradients, run, weights
from tests.unit.checkpoint.tiny import SEQUENCE, VOCABULARY, arguments

PLAIN = "--series-activation-order 0 --augmented-shortcuts 0"
MARKS = ("sequence_parallel", "allreduce", "no_weight_decay", *_MODEL_PARALLEL_ATTRIBUTE_DEFAULTS)


def step(layout: Layout, engine: bool, flags: tuple, pi: str | None) -> dict:
    """The model as built, its first gradients, and where three steps lead."""
    made = run(layout, engine, flags, pi)
    found = {"marks": marks(made), "built": weights(made)}
    made.train(1, before_update=lambda: found.update(gradients=gradients(made)))
    made.train(2)
    return found | {"trained": weights(made), "losses": made.losses, "norms": made.norms}


def marks(made) -> dict:
    """What Megatron-Core reads off each parameter besides its values."""
    return {
        name: (p.shape, p.dtype, p.requires_grad, *(getattr(p, mark, None) or None for mark in MARKS))
        for chunk in map(unwrap, made.model)
        for name, p in chunk.named_parameters()
    }


OTHERS = (
    "--qk-layernorm --qk-layernorm-across-heads --norm-placement both --apply-layernorm-1p --no-rope-freq 2 "
    "--embedding-multiplier 2 --residual-multiplier 0.5 --logits-scaling 2 --softmax-scale 0.3"
)
WINDOW = "--window-size 5,0 --window-attn-skip-freq 2 --window-rotary-base 50"
CASES = {
    "tp1": (Layout(), (), None),
    "tp1-plain": (Layout(), (), PLAIN),
    "tp1-qknorm": (Layout(), ("--qk-layernorm",), None),
    "tp1-layernorm-bias": (
        Layout(), ("--normalization", "LayerNorm", "--add-qkv-bias"), None
    ),
    "tp2": (Layout(tp=2), (), None),
    "tp2-sequence-parallel": (Layout(tp=2), ("--sequence-parallel", "--qk-layernorm"), None),
    "dp2-distributed": (
        Layout(dp=2),
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
        None,
    ),
    "pp2": (Layout(pp=2), (), None),
    "tp2-other-makers": (Layout(tp=2), OTHERS.split(), None),
    "tp1-window": (Layout(), WINDOW.split(), None),
    "tp2-documents": (
        Layout(tp=2), ("--reset-attention-mask", "--micro-batch-size", "2", *WINDOW.split()), None
    ),
}  # fmt: skip


#: Relative to the largest value, and absolute: Adam makes steps of the learning rate's size out of gradients
#: that are nothing but rounding.
TOLERANCES = {"built": (0.0, 0.0), "gradients": (2e-6, 0.0), "trained": (2e-5, 1e-5)}


@pytest.mark.parametrize("case", CASES)
def test_the_same_step(pool, case):
    layout, flags, pi = CASES[case]
    local, engine = (pool.run(layout, step, layout, on, flags, pi) for on in (False, True))
    for expected, found in zip(local, engine, strict=True):
        assert found["marks"] == expected["marks"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for part, (relative, absolute) in TOLERANCES.items():
            assert found[part].keys() == expected[part].keys()
            for key, value in expected[part].items():
                scale = value.abs().max().item()
                torch.testing.assert_close(
                    found[part][key], value, rtol=relative, atol=relative * scale + absolute,
                    msg=lambda m, where=(part, *key): f"{where}: {m}",
                )  # fmt: skip


def gradients_of_autograd(engine: bool) -> dict:
    """Of a model without data parallelism's buffers, as inheritance uses one."""
    args = arguments(Layout(), device="cuda" if engine else None)
    (model,) = build_model(transformer_config(args), args)
    ids = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(SEQUENCE).expand(2, SEQUENCE)
    model(ids[:, :-1], positions, None, labels=ids[:, 1:]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradients_without_data_parallelism(pool):
    [expected], [found] = (pool.run(Layout(), gradients_of_autograd, on) for on in (False, True))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-6, atol=2e-6 * value.abs().max().item())
