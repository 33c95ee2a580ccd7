"""Linear layers through the faster library: the same values and gradients, summed where they belong."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_ext.kernels import fused, linear
from megatron_ext.models.builder import wrap_for_training
from tests.helpers.models import positions, small_config, small_model, tokens


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (7, 2, 48, 33), (65, 3, 64, 128)])
def test_function_is_a_linear_layer(shape, bias):
    s, b, inputs, outputs = shape
    torch.manual_seed(s)
    x, weight = torch.randn(s, b, inputs), torch.randn(outputs, inputs)
    leaves = [x, weight, torch.randn(outputs)] if bias else [x, weight]
    grad = torch.randn(s, b, outputs)

    def run(function, dtype):
        given = [t.to(dtype).requires_grad_() for t in leaves]
        out = function(*given)
        return out.double(), *(g.double() for g in torch.autograd.grad(out, given, grad.to(dtype)))

    found = run(
        lambda *t: linear._Linear.apply(*t, *([None] if not bias else []), False, False, None),
        torch.float32,
    )
    for mine, exact in zip(found, run(F.linear, torch.float64), strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=2e-6 * exact.abs().max().item())


@pytest.mark.skipif(not fused.available(), reason="the C++ kernels were not built")
@pytest.mark.parametrize("isa", fused._kernels.isa_names() if fused.available() else [])
@pytest.mark.parametrize(
    "rows,outputs,inputs",
    [(1, 1, 32), (5, 13, 32), (193, 24, 64), (400, 395, 96), (200, 1000, 544), (40, 7, 33), (0, 8, 32)],
)
def test_weight_gradient_is_added(isa, rows, outputs, inputs):
    """Blocks cut short in every direction; an odd width, which the kernel leaves to torch."""
    grad, x, total = torch.randn(rows, outputs), torch.randn(rows, inputs), torch.randn(outputs, inputs)
    exact = total.double() + grad.double().t() @ x.double()
    best, threads = fused._kernels.isa(), torch.get_num_threads()
    fused._kernels.use_isa(isa)
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(linear.add_product_(total.clone(), grad, x))
    finally:
        fused._kernels.use_isa(best)
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=2e-6 * (1 + rows) ** 0.5 * 4)
    if inputs % 32 == 0:
        assert torch.equal(found[0], found[1])


def gradients(model, ids) -> dict[str, torch.Tensor]:
    model.zero_grad_buffer()
    for _ in range(2):  # two microbatches: the second is added to the first
        model(ids, positions(ids), None, labels=ids.roll(-1, 1)).mean().backward()
    return {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.skipif(not fused.available(), reason="the C++ kernels were not built")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sums_in_place_what_autograd_sums(single_process, monkeypatch, tied):
    found = []
    for in_place in (True, False):
        if not in_place:  # Megatron-Core's own layers, gradients by autograd
            monkeypatch.setattr(linear, "speed_up", lambda model: None)
        config = small_config(gradient_accumulation_fusion=in_place, pangu_init="random")
        [model] = wrap_for_training(small_model(config, tied), config, DistributedDataParallelConfig())
        found.append(gradients(model, tokens()))
    for name, gradient in found[1].items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_a_bare_model_gets_its_gradients_from_autograd(single_process):
    model, ids = small_model(small_config(gradient_accumulation_fusion=True))[0], tokens()
    model(ids, positions(ids), None, labels=ids.roll(-1, 1)).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_weights_get_none(single_process):
    model, ids = small_model(small_config())[0], tokens()
    model.decoder.requires_grad_(False)
    model(ids, positions(ids), None, labels=ids.roll(-1, 1)).mean().backward()
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
    assert model.embedding.word_embeddings.weight.grad.abs().max() > 0
