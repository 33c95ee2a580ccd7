"""Megatron-Core's configuration objects from parsed arguments.

Mirrors megatron/training/arguments.py:core_transformer_config_from_args and training.py:get_model of
Megatron-LM 0.16.1. Call ``megatron_ext.platform.activate()`` first; this module imports Megatron-Core.
"""

import dataclasses
from argparse import Namespace
from typing import Any

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_ext.models.config import PanguProConfig

#: Fused forms that Megatron-LM uses unless told not to, and that a CPU does not have.
CUDA_FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)


def transformer_config(args: Namespace) -> PanguProConfig:
    """The model's configuration. Weights are not drawn while it is built: ours are drawn afterwards,
    at full shape, so that they do not depend on the layout."""
    values = _shared(args, PanguProConfig)
    values |= _renamed(args) | _activation(args)
    return PanguProConfig(**(values | dict.fromkeys(_unavailable_fusions(args), False)))


def _unavailable_fusions(args: Namespace) -> list[str]:
    """The fusions that this device or the installed packages do not have."""
    if args.device == "cpu":
        return list(CUDA_FUSIONS)
    return ["apply_rope_fusion"] if rope_utils.fused_apply_rotary_pos_emb is None else []


def _shared(args: Namespace, config: type) -> dict[str, Any]:
    """The arguments that a configuration class has under the same name."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(args).items() if name in names}


def _renamed(args: Namespace) -> dict[str, Any]:
    """Fields whose name or form differs from the argument's."""
    local = args.transformer_impl == "local"
    return {
        "attention_backend": AttnBackend[args.attention_backend],
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "num_layers_in_first_pipeline_stage": args.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": args.decoder_last_pipeline_num_layers,
        "cp_comm_type": args.cp_comm_type[0],
        "params_dtype": args.params_dtype,
        "pipeline_dtype": args.params_dtype,
        "batch_p2p_comm": not args.overlap_p2p_comm,
        # gloo sends straight from an output's memory: an overlapped send has to find it unchanged.
        "deallocate_pipeline_outputs": args.device == "cuda" or not args.overlap_p2p_comm,
        "persist_layer_norm": not args.no_persist_layer_norm,
        "fp8_param": args.fp8_param_gather,
        "cuda_graph_scope": [],  # the whole layer
        "perform_initialization": False,
        "use_cpu_initialization": bool(args.use_cpu_initialization),
        # The local attention never makes a masked softmax that could be fused.
        "masked_softmax_fusion": args.masked_softmax_fusion and not local,
    }


def _activation(args: Namespace) -> dict[str, Any]:
    """The FFN's nonlinearity; Megatron-Core's fused forms would pass the series activation by."""
    series = args.series_activation_order > 0
    if args.swiglu:
        return {
            "activation_func": F.silu,
            "gated_linear_unit": True,
            "bias_activation_fusion": args.bias_swiglu_fusion and not series,
        }
    if args.squared_relu:
        return {"activation_func": squared_relu, "bias_activation_fusion": False}
    if args.quick_geglu:
        return {"activation_func": quick_gelu, "gated_linear_unit": True, "bias_activation_fusion": False}
    return {"activation_func": F.gelu, "bias_activation_fusion": args.bias_gelu_fusion}


def optimizer_config(args: Namespace) -> OptimizerConfig:
    """The optimizer's configuration; loss scaling is for fp16 alone."""
    return OptimizerConfig(
        **(_shared(args, OptimizerConfig) | {"fp8_recipe": args.fp8_recipe if args.fp8 else None})
    )


def ddp_config(args: Namespace) -> DistributedDataParallelConfig:
    """How gradients are kept and reduced over the data parallel ranks."""
    values = _shared(args, DistributedDataParallelConfig)
    return DistributedDataParallelConfig(
        **values
        | {
            "grad_reduce_in_fp32": args.accumulate_allreduce_grads_in_fp32,
            # Megatron-Core's check raises on one rank while the others wait for its gradients;
            # training/step.py checks with all ranks agreeing.
            "check_for_nan_in_grad": False,
            "bucket_size": args.ddp_bucket_size,
            "pad_buckets_for_high_nccl_busbw": args.ddp_pad_buckets_for_high_nccl_busbw,
            "average_in_collective": args.ddp_average_in_collective,
            "align_param_gather": args.align_param_gather,
        }
    )
