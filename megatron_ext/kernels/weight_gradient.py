"""What Megatron-Core leaves to Apex or Transformer Engine, done by torch."""

from functools import cache

import torch


class WeightGradients:
    """Stands for ``fused_weight_gradient_mlp_cuda``: a weight's gradient added where gradients are summed.

    The product of a linear layer's backward goes straight into the data parallel buffer, instead of
    into a tensor of its own that is then added to it. Serves tensor_parallel/layers.py 569 and 573.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(
        inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor
    ) -> None:
        """main_grad [out, in] += grad_output [tokens, out]^T inputs [tokens, in]."""
        if inputs.dtype == main_grad.dtype:
            main_grad.addmm_(grad_output.t(), inputs)
        elif main_grad.dtype == torch.float32 and adds_in_fp32(inputs.dtype, inputs.device):
            _add_product(main_grad, grad_output.t(), inputs)
        else:
            main_grad.add_(grad_output.t() @ inputs)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (fp32) += a b (of half precision), rounded nowhere in between."""
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@cache
def adds_in_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has :func:`_add_product` for this format and device, found by a small exact product.

    torch knows it since 2.8, on CUDA alone.
    """
    a = torch.arange(256, device=device).remainder(7).view(16, 16).to(dtype)
    total = torch.full((16, 16), 0.25, device=device)
    expected = total + a.float() @ a.float()
    try:
        _add_product(total, a, a)
    except (TypeError, RuntimeError):  # torch has no such argument, or not on this device
        return False
    return torch.equal(total, expected)


#: Stands for ``_grad_accum_fusion_available``, which says that the extension above was imported.
WEIGHT_GRADIENTS_AVAILABLE = True


def provide_weight_gradients() -> None:
    """Let Megatron-Core's linear layers sum their weights' gradients in place without Apex's extension.

    Its output layer is one of them whatever the layers are made of, and refuses to be built with
    ``gradient_accumulation_fusion`` where the extension is missing (tensor_parallel/layers.py 917).
    """
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = WeightGradients
        layers._grad_accum_fusion_available = True
