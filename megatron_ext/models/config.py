"""The model configuration: Megatron-Core's TransformerConfig and the PanGu-pi options.

Mirrors megatron/training/arguments.py:core_transformer_config_from_args of Megatron-LM 0.16.1.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.config import RunConfig

#: Fused forms that Megatron-LM uses unless told not to, and that a CPU does not have.
CUDA_FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)


@dataclass
class PanguProConfig(TransformerConfig):
    """TransformerConfig with the two PanGu-pi modules and the options of other published models.

    With all of them off it is Megatron-Core's own. Fields are named as in :class:`ModelConfig`.
    """

    series_activation_order: int = 0
    """Number n of terms of the series informed activation in the FFN; 0 keeps the plain activation."""

    augmented_shortcuts: int = 0
    """Number T of augmented shortcuts around the attention; 0 keeps the plain residual."""

    augmented_shortcut_reduction: int = 32
    """Reduction r of an augmented shortcut's bottleneck: hidden -> hidden/r -> hidden."""

    pangu_init: Literal["identity", "random"] = "identity"
    """identity: the modules start without effect, so that a plain model's output is kept; random:
    they start like any other weight."""

    norm_placement: Literal["input", "output", "both"] = "input"
    """Normalize the input of attention and FFN, their output before the residual addition, or both."""

    qk_layernorm_across_heads: bool = False
    """Normalize queries, and keys, over all heads together instead of per head."""

    window_rotary_base: int | None = None
    """Base of the rotary embedding in layers with a window, which is not scaled; None: as in other layers."""

    embedding_multiplier: float = 1.0
    """Multiply the word embeddings by this factor before the first layer."""

    residual_multiplier: float = 1.0
    """Multiply the outputs of attention and FFN by this factor before the residual addition."""

    logits_scaling: float = 1.0
    """Divide the logits by this factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.series_activation_order and not self.gated_linear_unit:
            raise ValueError("--series-activation-order acts on the gate of SwiGLU: add --swiglu")
        if self.augmented_shortcuts and self.hidden_size % self.augmented_shortcut_reduction:
            raise ValueError(
                f"--hidden-size {self.hidden_size} is not divisible by "
                f"--augmented-shortcut-reduction {self.augmented_shortcut_reduction}"
            )


def transformer_config(run: RunConfig) -> PanguProConfig:
    """The model's configuration. Weights are not drawn while it is built: ours are drawn afterwards,
    at full shape, so that they do not depend on the layout."""
    values = fields_of(run, PanguProConfig)
    values |= _renamed(run) | _activation(run)
    return PanguProConfig(**(values | dict.fromkeys(_unavailable_fusions(run), False)))


def _unavailable_fusions(run: RunConfig) -> list[str]:
    """The fusions that this device or the installed packages do not have."""
    if run.process.device == "cpu":
        return list(CUDA_FUSIONS)
    return ["apply_rope_fusion"] if rope_utils.fused_apply_rotary_pos_emb is None else []


def _renamed(run: RunConfig) -> dict[str, Any]:
    """Fields whose name or form differs from the argument's."""
    local = run.layers.transformer_impl == "local"
    return {
        "attention_backend": AttnBackend[run.layers.attention_backend],
        "num_query_groups": run.model.num_query_groups if run.model.group_query_attention else None,
        # As lists, because Megatron-Core's frequencies must divide the number of layers.
        "no_rope_freq": list(run.model.unrotated) if any(run.model.unrotated) else None,
        "window_attn_skip_freq": list(run.model.windowed) if any(run.model.windowed) else None,
        "num_layers_in_first_pipeline_stage": run.parallel.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": run.parallel.decoder_last_pipeline_num_layers,
        "cp_comm_type": run.parallel.cp_comm_type[0],
        "params_dtype": run.precision.params_dtype,
        "pipeline_dtype": run.precision.params_dtype,
        "batch_p2p_comm": not run.parallel.overlap_p2p_comm,
        # gloo sends straight from an output's memory: an overlapped send has to find it unchanged.
        "deallocate_pipeline_outputs": run.process.device == "cuda" or not run.parallel.overlap_p2p_comm,
        "persist_layer_norm": not run.fusion.no_persist_layer_norm,
        "fp8_param": run.precision.fp8_param_gather,
        "cuda_graph_scope": [],  # the whole layer
        "perform_initialization": False,
        "use_cpu_initialization": bool(run.init.use_cpu_initialization),
        # The local attention never makes a masked softmax that could be fused.
        "masked_softmax_fusion": run.fusion.masked_softmax_fusion and not local,
    }


def _activation(run: RunConfig) -> dict[str, Any]:
    """The FFN's nonlinearity; Megatron-Core's fused forms would pass the series activation by."""
    series = run.model.series_activation_order > 0
    if run.model.swiglu:
        return {
            "activation_func": F.silu,
            "gated_linear_unit": True,
            "bias_activation_fusion": run.fusion.bias_swiglu_fusion and not series,
        }
    if run.model.squared_relu:
        return {"activation_func": squared_relu, "bias_activation_fusion": False}
    if run.model.quick_geglu:
        return {"activation_func": quick_gelu, "gated_linear_unit": True, "bias_activation_fusion": False}
    if run.model.geglu:
        return {"activation_func": gelu_tanh, "gated_linear_unit": True, "bias_activation_fusion": False}
    return {"activation_func": F.gelu, "bias_activation_fusion": run.fusion.bias_gelu_fusion}


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU as one operator."""
    return F.gelu(x, approximate="tanh")


def fields_of(run: RunConfig, config: type) -> dict[str, Any]:
    """The arguments that a configuration class has under the same name."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in run.flat().items() if name in names}
