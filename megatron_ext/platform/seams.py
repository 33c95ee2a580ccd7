"""Every place where Megatron-Core names CUDA and a CPU run needs a replacement, by version.

Each seam names the upstream module (below ``megatron.core``), what is replaced there, and the
lines of 0.16.1 that it serves. ``loader.py`` applies them while the module is imported; nothing is
copied and nothing changes outside ``megatron.core``. A test imports every module named here and
fails if a seam no longer matches, so an upstream change cannot go unnoticed.
"""

from dataclasses import dataclass
from functools import cache

from megatron_ext.platform.engine import version_of

#: The version that every test passes with.
SUPPORTED_MEGATRON_CORE = "0.16.1"

DEVICE = {"cuda": "cpu"}
TENSOR_TYPES = {
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


@dataclass(frozen=True)
class Seam:
    """What is replaced in one module: string constants, attribute names, or whole functions.

    ``functions`` maps the name of a function, or of another object, to ``"module:name"`` of ours.
    """

    module: str
    serves: str
    constants: dict[str, str] | None = None
    names: dict[str, str] | None = None
    functions: dict[str, str] | None = None


_SEAMS = (
    Seam("pipeline_parallel.schedules", "418, 596, 983, 2138: token counts, autocast", DEVICE),
    Seam("pipeline_parallel.utils", "334: the communication stream", DEVICE),
    Seam("optimizer.grad_scaler", "15, 88-94: loss scale", DEVICE),
    Seam(
        "optimizer.optimizer",
        "473-485, 907: scale and found-inf; 671-699: type() of a parameter",
        DEVICE | TENSOR_TYPES,
    ),
    Seam(
        "optimizer.distrib_optimizer",
        "361, 420, 582: type() of a parameter; 791, 1077, 1089: gathering the state for a checkpoint",
        TENSOR_TYPES,
        # torch.cuda.current_device() becomes torch.cpu.current_device(), which is "cpu".
        names={"cuda": "cpu"},
    ),
    Seam(
        "optimizer.clip_grads",
        "90-115, 174, 207: norm and count buffers; 167: type() of a gradient",
        DEVICE | TENSOR_TYPES,
    ),
    Seam("distributed.param_and_grad_buffer", "768: warm-up of the reduction", DEVICE),
    Seam(
        "tensor_parallel.layers",
        "68-69: device type of custom_fwd and custom_bwd; 44-48: weight gradients summed in place",
        DEVICE,
        functions={
            "fused_weight_gradient_mlp_cuda": "megatron_ext.kernels.weight_gradient:WeightGradients",
            "_grad_accum_fusion_available": "megatron_ext.kernels.weight_gradient:WEIGHT_GRADIENTS_AVAILABLE",
        },
    ),
    Seam("tensor_parallel.data", "37: broadcast of the sizes of a batch", DEVICE),
    Seam("tensor_parallel.random", "42, 61, 93-97: device of the generator", DEVICE),
    Seam("transformer.utils", "35, 40: default attention masks", DEVICE),
    Seam(
        "utils",
        "1192-1215: norm without Apex, and its precision; clipping without a copy",
        DEVICE,
        functions={
            "local_multi_tensor_l2_norm": "megatron_ext.kernels.multi_tensor:multi_tensor_l2_norm",
            "local_multi_tensor_scale": "megatron_ext.kernels.multi_tensor:multi_tensor_scale",
        },
    ),
    Seam(
        "models.common.embeddings.rope_utils",
        "_apply_rotary_pos_emb_bshd: one pass instead of six",
        functions={"_apply_rotary_pos_emb_bshd": "megatron_ext.kernels.rope:apply_rotary"},
    ),
    Seam("rerun_state_machine", "261, 265: agreement between ranks", DEVICE),
    Seam("dist_checkpointing.exchange_utils", "98-110, 326: exchange of shards between ranks", DEVICE),
    Seam("dist_checkpointing.strategies.state_dict_saver", "204: agreement on cached plans", DEVICE),
    Seam(
        "models.common.language_module.language_module",
        "244: .cuda() on the tied output weight of the last stage",
        names={"cuda": "cpu"},
    ),
)

#: The versions whose seams were checked; others are refused. Those that are not supported run with a warning;
#: docs/engine.md lists the differences.
SEAMS = {"0.16.1": _SEAMS, "0.19.2": _SEAMS}


@cache
def installed_seams() -> dict[str, Seam]:
    """The seams of the installed version by the full name of their module."""
    version = version_of("megatron-core") or SUPPORTED_MEGATRON_CORE
    return {f"megatron.core.{seam.module}": seam for seam in SEAMS[version]}
