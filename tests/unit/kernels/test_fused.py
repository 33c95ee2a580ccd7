"""The fused kernels against their formulas in plain PyTorch: values, gradients, edges, threads, forks."""

import hashlib
import multiprocessing

import pytest
import torch

from megatron_ext.kernels import fused

needs_kernels = pytest.mark.skipif(not fused.available(), reason="megatron_ext._kernels was not built")
DTYPES = (torch.float32, torch.bfloat16)


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def outputs_and_gradients(function, inputs, dtype) -> list[torch.Tensor]:
    """Outputs, and the gradients of every input for a fixed random gradient of every output."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [draw(*y.shape, seed=10 + i).bfloat16().to(dtype) for i, y in enumerate(outputs)]
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, inputs, grads))]


def check(kernel, reference, inputs, dtype) -> None:
    """The kernel in ``dtype`` against the formula in float64 on the same numbers.

    bfloat16 may be off by its rounding alone (arithmetic is float32): one unit in the last place of
    8 bits; sums of signed terms are held to their scale.
    """
    inputs = [t.to(dtype) for t in inputs]
    found = outputs_and_gradients(kernel, inputs, dtype)
    expected = outputs_and_gradients(reference, [t.double() for t in inputs], torch.float64)
    relative, absolute = (2e-6, 2e-6) if dtype == torch.float32 else (2**-8, 1e-4)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        scale = want.abs().max().item() if want.numel() else 1.0
        torch.testing.assert_close(got.double(), want, rtol=relative, atol=absolute * max(1.0, scale))


def series_inputs(rows: int, f: int, n: int) -> list[torch.Tensor]:
    return [draw(rows, 2 * f, seed=1), 1 + draw(n, f, seed=2) / 2, draw(n, f, seed=3)]


def angles(s: int, rot: int, seed: int = 1) -> torch.Tensor:
    """[s, 1, 1, rot] as Megatron-Core makes them: the same in both halves."""
    half = draw(s, 1, 1, rot // 2, seed=seed).float()
    return torch.cat((half, half), dim=-1)


class TestReferences:
    """The formulas themselves are differentiated rightly (float64 never reaches the kernels)."""

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_series_swiglu(self, n):
        inputs = [t.requires_grad_() for t in series_inputs(3, 5, n)]
        assert torch.autograd.gradcheck(fused.series_swiglu, inputs)

    def test_others(self):
        x, w = draw(3, 6).requires_grad_(), draw(6, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(fused.swiglu, (x,))
        assert torch.autograd.gradcheck(lambda x, w: fused.rms_norm(x, w, 1e-5), (x, w))
        t, freqs = draw(3, 2, 2, 6, seed=2).requires_grad_(), draw(3, 1, 1, 4, seed=3)
        assert torch.autograd.gradcheck(lambda t: fused.apply_rope(t, freqs), (t,))

    def test_rope_is_megatron_cores(self):
        from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

        t, freqs = draw(5, 2, 3, 8), draw(5, 1, 1, 6, seed=1)
        torch.testing.assert_close(fused.apply_rope_reference(t, freqs), _apply_rotary_pos_emb_bshd(t, freqs))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstReference:
    @pytest.mark.parametrize("f", [1, 7, 33, 4096])
    @pytest.mark.parametrize("n", [1, 2, 3, 4])
    def test_series_swiglu(self, f, n, dtype):
        check(fused.series_swiglu, fused.series_swiglu_reference, series_inputs(37, f, n), dtype)

    @pytest.mark.parametrize("f", [1, 33, 1040])
    def test_swiglu(self, f, dtype):
        check(fused.swiglu, fused.swiglu_reference, [draw(5, 3, 2 * f)], dtype)

    @pytest.mark.parametrize("h", [1, 7, 33, 1792])
    def test_rms_norm(self, h, dtype):
        inputs = [draw(70, h), draw(h, seed=1)]
        check(
            lambda *t: fused.rms_norm(*t, 1e-5), lambda *t: fused.rms_norm_reference(*t, 1e-5), inputs, dtype
        )

    @pytest.mark.parametrize("d, rot", [(2, 2), (24, 14), (128, 128), (128, 64)])
    def test_rope(self, d, rot, dtype):
        freqs = draw(17, 1, 1, rot, seed=1).float() * 10
        check(
            lambda t: fused.apply_rope(t, freqs),
            lambda t: fused.apply_rope_reference(t, freqs.double()),
            [draw(17, 2, 3, d)],
            dtype,
        )


@needs_kernels
class TestEdges:
    def test_every_instruction_set(self):
        kernels = fused._kernels
        best = kernels.isa()
        try:
            for name in kernels.isa_names():
                kernels.use_isa(name)
                for dtype in DTYPES:
                    check(fused.series_swiglu, fused.series_swiglu_reference, series_inputs(5, 37, 2), dtype)
                    norm = [draw(5, 37), draw(37, seed=1)]
                    check(
                        lambda *t: fused.rms_norm(*t, 1e-5),
                        lambda *t: fused.rms_norm_reference(*t, 1e-5),
                        norm,
                        dtype,
                    )
        finally:
            kernels.use_isa(best)
        with pytest.raises(ValueError, match="instruction set"):
            kernels.use_isa("abacus")

    def test_exp_is_within_two_units_in_the_last_place(self):
        x = torch.cat(
            [torch.linspace(-120, 100, 200_001), torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])]
        )
        y = torch.empty_like(x)
        fused._kernels.exponential(x.data_ptr(), y.data_ptr(), x.numel())
        exact = x.double().exp()
        nearest = exact.float()
        finite = nearest.isfinite()
        assert torch.equal(y[~finite].nan_to_num(7.0), nearest[~finite].nan_to_num(7.0))
        unit = (torch.nextafter(nearest, torch.tensor(torch.inf)) - nearest).double()
        assert ((y.double() - exact).abs() / unit)[finite].max() < 2

    def test_non_contiguous(self):
        x, a, b = (t.float() for t in series_inputs(12, 10, 2))
        views = [x.t().contiguous().t(), a.t().contiguous().t(), b.repeat(1, 2)[:, :10]]
        assert not any(v.is_contiguous() for v in views)
        for got, want in zip(
            outputs_and_gradients(fused.series_swiglu, views, torch.float32),
            outputs_and_gradients(fused.series_swiglu, [x, a, b], torch.float32),
            strict=True,
        ):
            assert torch.equal(got, want)

    def test_rope_reads_slices_of_a_joint_projection(self):
        joint, freqs = draw(6, 2, 3, 24, dtype=torch.float32).requires_grad_(), angles(6, 8)
        query, key, _ = joint.split(8, dim=-1)
        fused.apply_rope(query, freqs).square().sum().backward(retain_graph=True)
        torch.testing.assert_close(joint.grad[..., :8], 2 * query.detach())  # a rotation keeps the norm
        assert not joint.grad[..., 8:].any()
        swapped = key.detach().permute(0, 2, 1, 3)
        torch.testing.assert_close(
            fused.apply_rope(swapped, freqs), fused.apply_rope_reference(swapped, freqs)
        )

    def test_rope_in_place(self):
        t, freqs = draw(6, 2, 3, 24, dtype=torch.float32), angles(6, 10)
        want = fused.apply_rope(t, freqs)
        assert fused.apply_rope(t, freqs, inplace=True) is t
        assert torch.equal(t, want)
        leaf = draw(6, 2, 3, 24, dtype=torch.float32).requires_grad_()
        fused.apply_rope(leaf * 1.0, freqs, inplace=True).square().sum().backward()
        torch.testing.assert_close(leaf.grad, 2 * leaf.detach())

    def test_rope_sees_new_angles(self):
        t = draw(6, 1, 1, 4, dtype=torch.float32)
        for seed in range(3):
            freqs = angles(6, 4, seed)
            torch.testing.assert_close(fused.apply_rope(t, freqs), fused.apply_rope_reference(t, freqs))

    @pytest.mark.parametrize(
        "value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 88.9, -88.9, -103.0]
    )
    def test_extreme_values_match_torch(self, value):
        x, a, b = (t.float() for t in series_inputs(4, 37, 2))
        a.fill_(1.0)
        x[1, 3] = x[2, 36] = x[3, 37 + 5] = value
        found = outputs_and_gradients(fused.series_swiglu, [x, a, b], torch.float32)
        expected = outputs_and_gradients(fused.series_swiglu_reference, [x, a, b], torch.float32)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
    def test_extreme_values_in_a_norm(self, value):
        x, w = draw(3, 37, dtype=torch.float32), draw(37, seed=1, dtype=torch.float32)
        x[1, 36] = value
        torch.testing.assert_close(
            fused.rms_norm(x, w, 1e-5), fused.rms_norm_reference(x, w, 1e-5), equal_nan=True
        )

    def test_empty(self):
        y = fused.series_swiglu(torch.empty(0, 8, requires_grad=True), torch.ones(2, 4), torch.ones(2, 4))
        y.sum().backward()
        assert y.shape == (0, 4)

    def test_wrong_shapes_are_named(self):
        with pytest.raises(ValueError, match=r"scale, bias \[n, f\].*\(3, 8\)"):
            fused.series_swiglu(torch.ones(3, 8), torch.ones(2, 8), torch.ones(2, 8))
        with pytest.raises(ValueError, match=r"even rot"):
            fused.apply_rope(torch.ones(3, 1, 1, 8), torch.ones(3, 1, 1, 3))


def digests(threads: int) -> list[str]:
    """The bits of what the kernels that sum over rows give on ``threads`` threads, at many tasks.

    Between the two calls of set_num_threads nothing but our kernels is large enough to be shared
    among threads: torch's own operators would hang in a child forked from a parent with threads.
    """
    torch.set_num_threads(1)
    x, a, b = (t.float().requires_grad_() for t in series_inputs(300, 1100, 2))
    z, w = (draw(*shape, dtype=torch.float32).requires_grad_() for shape in ((300, 400), (400,)))
    grads = [draw(300, 1100, seed=4, dtype=torch.float32), draw(300, 400, seed=5, dtype=torch.float32)]
    torch.set_num_threads(threads)
    activated, normed = fused.series_swiglu(x, a, b), fused.rms_norm(z, w, 1e-5)
    results = [activated, normed, *torch.autograd.grad((activated, normed), (x, a, b, z, w), grads)]
    torch.set_num_threads(1)
    return [hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for t in results]


@needs_kernels
class TestThreads:
    @pytest.fixture(autouse=True)
    def keep_threads(self):
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    def test_same_bits_for_any_number_of_threads(self):
        expected = digests(1)
        for threads in (2, 3, 5, 2):
            assert digests(threads) == expected

    def test_works_in_a_forked_child(self):
        """Also after the parent used its threads, where OpenMP's own pool would hang."""
        expected = digests(2)
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=lambda: sender.send(digests(2)))
        child.start()
        try:
            assert receiver.poll(60), "the forked child hangs"
            assert receiver.recv() == expected
        finally:
            child.kill()
            child.join()


def test_megatron_core_rotates_by_ours_on_a_gpu_too(monkeypatch):
    """A seam puts it there on a CPU; elsewhere the builder does."""
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_ext.kernels import rope

    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", None)
    rope.provide_rope()
    t, freqs = torch.randn(3, 2, 4, 8), torch.randn(3, 1, 1, 8)
    found = rope_utils._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=False, mscale=1.0)
    torch.testing.assert_close(found, fused.apply_rope_reference(t, freqs))
