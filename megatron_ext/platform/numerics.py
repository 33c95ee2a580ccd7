"""What Megatron-Core leaves to Apex or Transformer Engine, done on a CPU."""

import torch

# One block of this many fp32 values (1 MiB) is widened at a time, so that no copy of a whole
# gradient in float64 is ever made.
_BLOCK = 1 << 18


def sum_of_squares(tensor: torch.Tensor) -> float:
    """Sum of the squared elements of ``tensor`` (any float dtype), accumulated in float64."""
    flat = tensor.detach().reshape(-1)
    total = 0.0
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK].double()
        total += torch.dot(block, block).item()
    return total


class WeightGradients:
    """Stands for ``fused_weight_gradient_mlp_cuda``: a weight's gradient added where gradients are summed.

    The product of a linear layer's backward goes straight into the data parallel buffer, instead of
    into a tensor of its own that is then added to it. Serves tensor_parallel/layers.py 569 and 573.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor):
        """main_grad [out, in] += grad_output [tokens, out]^T inputs [tokens, in]."""
        if inputs.dtype == main_grad.dtype:
            main_grad.addmm_(grad_output.t(), inputs)
        else:
            main_grad.add_(grad_output.t() @ inputs)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


#: Stands for ``_grad_accum_fusion_available``, which says that the extension above was imported.
WEIGHT_GRADIENTS_AVAILABLE = True
