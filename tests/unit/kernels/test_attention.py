"""Causal attention in one pass: the formula's values and gradients, for every instruction set and shape."""

import pytest
import torch

from megatron_ext.kernels import attention, documents, fused
from tests.helpers.models import positions, small_config, small_model, tokens

needs_kernels = pytest.mark.skipif(not fused.available(), reason="the C++ kernels were not built")
INSTRUCTION_SETS = fused._kernels.isa_names() if fused.available() else []


def angles(length: int, rotated: int) -> torch.Tensor | None:
    half = 3 * torch.randn(length, 1, 1, rotated // 2)
    return torch.cat((half, half), -1) if rotated else None


def gains(width: int, dtype: torch.dtype) -> attention.Norms:
    return attention.Norms(*(1 + 0.3 * torch.randn(2, width)).to(dtype), 1e-6)


def packed(length: int, batch: int, mean: float) -> torch.Tensor:
    """The starts of documents of random lengths, their mean ``mean``."""
    return documents.document_starts(torch.rand(batch, length) < 1 / mean)


def value_and_gradient(
    function, qkv, heads_per_group, width, freqs, grad, norms=None, window=None, starts=None
):
    qkv = qkv.clone().requires_grad_()
    if norms is not None:
        learned = [gain.to(qkv.dtype).clone().requires_grad_() for gain in norms[:2]]
        norms = attention.Norms(*learned, norms.eps)
    out = function(qkv, heads_per_group, width, freqs, width**-0.5, norms, window, starts)
    out.backward(grad.to(out.dtype))
    return out.detach().double(), *(t.grad.double() for t in (qkv, *(norms or ())[:2]))


@needs_kernels
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("length", "batch", "groups", "heads", "width", "rotated", "normed", "window", "mean"),
    [
        (1, 1, 1, 1, 16, 16, False, None, None),
        (5, 2, 1, 1, 16, 0, False, None, None),
        (64, 1, 2, 1, 32, 32, False, None, None),  # exactly one block
        (130, 2, 2, 3, 64, 24, False, None, None),  # three blocks, grouped queries, part of a head rotated
        (97, 1, 1, 2, 112, 112, False, None, None),  # a width that is no multiple of a panel
        (130, 2, 2, 3, 64, 24, True, None, None),  # queries and keys normalized
        (70, 2, 1, 2, 16, 0, True, 1, None),  # two keys are seen
        (200, 1, 2, 2, 32, 32, False, 63, None),  # as many as a block
        (230, 1, 1, 2, 48, 48, True, 70, None),  # a whole block is seen by some queries alone
        (150, 1, 1, 1, 16, 16, False, 500, None),  # a window wider than the sequence
        (64, 1, 1, 1, 16, 0, False, None, 3),  # short documents
        (200, 3, 2, 2, 32, 32, True, None, 40),
        (330, 2, 1, 2, 16, 8, False, None, 150),  # longer than a block
        (230, 2, 1, 2, 48, 48, False, 70, 90),  # in a window
    ],
)
def test_equals_the_formula(isa, dtype, length, batch, groups, heads, width, rotated, normed, window, mean):
    torch.manual_seed(length)
    qkv = torch.randn(length, batch, groups, (heads + 2) * width).to(dtype)
    freqs, grad = angles(length, rotated), torch.randn(length, batch, groups * heads * width).to(dtype)
    norms = gains(width, dtype) if normed else None
    starts = packed(length, batch, mean) if mean else None
    before = fused._kernels.isa()
    fused._kernels.use_isa(isa)
    try:
        found = value_and_gradient(
            attention.causal_attention, qkv, heads, width, freqs, grad, norms, window, starts
        )
    finally:
        fused._kernels.use_isa(before)
    exact = value_and_gradient(
        attention.causal_attention_reference, qkv.double(), heads, width,
        None if freqs is None else freqs.double(), grad, norms, window, starts,
    )  # fmt: skip
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


@needs_kernels
def test_large_scores_do_not_overflow():
    qkv = 60 * torch.randn(80, 1, 1, 3 * 16)
    grad = torch.randn(80, 1, 16)
    found = value_and_gradient(attention.causal_attention, qkv, 1, 16, None, grad)
    exact = value_and_gradient(attention.causal_attention_reference, qkv.double(), 1, 16, None, grad)
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3 * theirs.abs().max().item())


@needs_kernels
def test_blocks_without_a_visible_key_are_skipped():
    """Tokens of another document are not read, let alone multiplied by 0: NaN among them spreads nowhere."""
    qkv, grad = torch.randn(320, 1, 1, 4 * 16), torch.randn(320, 1, 2 * 16)
    ends = torch.zeros(1, 320, dtype=torch.bool)
    ends[0, 127] = ends[0, 255] = True
    starts = documents.document_starts(ends)
    whole = value_and_gradient(attention.causal_attention, qkv, 2, 16, None, grad, starts=starts)
    for first, last in ((0, 128), (128, 256), (256, 320)):
        poisoned = qkv.clone()
        poisoned[:first] = poisoned[last:] = torch.nan
        found = value_and_gradient(attention.causal_attention, poisoned, 2, 16, None, grad, starts=starts)
        for mine, theirs in zip(found, whole, strict=True):
            assert torch.equal(mine[first:last], theirs[first:last])


@needs_kernels
def test_threads_change_no_bit():
    qkv, freqs, grad = torch.randn(200, 2, 2, 4 * 32), angles(200, 32), torch.randn(200, 2, 2 * 2 * 32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            norms = attention.Norms(torch.ones(32), torch.ones(32), 1e-5)
            found.append(value_and_gradient(attention.causal_attention, qkv, 2, 32, freqs, grad, norms, 99))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="causal_attention needs qkv"):
        attention.causal_attention(torch.randn(4, 1, 1, 50), 1, 16, None, 1.0)
    with pytest.raises(ValueError, match="even rot <= d"):
        attention.causal_attention(torch.randn(4, 1, 1, 48), 1, 16, torch.randn(5, 1, 1, 16), 1.0)


@needs_kernels
@pytest.mark.parametrize("mean", [None, 7], ids=["one document", "documents"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_query_groups": 2},
        {"num_query_groups": 4},
        {"kv_channels": 32, "qk_layernorm": True},
        {"qk_layernorm": True, "layernorm_zero_centered_gamma": True, "norm_placement": "both"},
        {"qk_layernorm": True, "qk_layernorm_across_heads": True, "norm_placement": "output"},
        {"no_rope_freq": [1, 0]},
        {"window_size": (9, 0), "window_attn_skip_freq": [1, 0], "window_rotary_base": 500},
        {
            "softmax_scale": 0.5,
            "residual_multiplier": 0.3,
            "embedding_multiplier": 8.0,
            "logits_scaling": 2.0,
        },
    ],
    ids=["gqa", "mha", "wide heads", "1p", "across heads", "no rope", "window", "multipliers"],
)
def test_model_uses_it_and_stays_the_same(single_process, monkeypatch, changes, mean):
    """The one pass against Megatron-Core's split, rotation and core attention, in a whole model."""
    model, ids = small_model(small_config(**changes))[0], tokens()
    starts = packed(ids.size(1), ids.size(0), mean) if mean else None
    calls = []
    kernel = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *args: calls.append(args) or kernel(*args))
    found = []
    for supports in (attention.supports, lambda *args: False):
        monkeypatch.setattr(attention, "supports", supports)
        model.zero_grad()
        loss = model(ids, positions(ids), starts, labels=ids.roll(-1, 1)).mean()
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    assert len(calls) == 2  # once a layer, in the first run alone
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
