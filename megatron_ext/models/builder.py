"""From arguments to the model chunks of one pipeline rank."""

from typing import TypeVar

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from torch import nn

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.config.training import OptimizerConfig
from megatron_ext.kernels.rope import provide_rope
from megatron_ext.kernels.weight_gradient import provide_weight_gradients
from megatron_ext.models.config import PanguProConfig, fields_of
from megatron_ext.models.gpt_model import PanguModel
from megatron_ext.models.initialization import initialize, mark_split_parameters
from megatron_ext.models.layer_specs import block_spec

Model = TypeVar("Model", bound=PanguModel)


def build_model(
    config: PanguProConfig, run: RunConfig, parallel_output: bool = True, initialized: bool = True
) -> list[PanguModel]:
    """The model chunks of this rank: one, or one a virtual pipeline stage, initialised and in place.

    ``run`` gives what TransformerConfig does not hold: the padded vocabulary and how much of it takes part
    in the softmax (``arguments.vocabulary``), positions, tying. With
    ``initialized`` False the weights are whatever lay in memory, for a model that is filled at once.
    """
    return build_chunks(PanguModel, config, run, parallel_output, initialized)


def build_chunks(
    kind: type[Model], config: PanguProConfig, run: RunConfig, parallel_output: bool, initialized: bool
) -> list[Model]:
    """As :func:`build_model`, of another class."""
    provide_weight_gradients()
    if platform.on_gpu():  # on a CPU a seam does it
        provide_rope()
    stages = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    chunks = [
        _build_chunk(kind, config, run, stage if stages > 1 else None, parallel_output)
        for stage in range(stages)
    ]
    for chunk in chunks:
        mark_split_parameters(chunk)
        if initialized:
            initialize(chunk, config, run.init.seed)
        sum_weight_gradients_in_place(chunk)
    return [chunk.to(platform.current_device()) for chunk in chunks]


def _build_chunk(
    kind: type[Model], config: PanguProConfig, run: RunConfig, vp_stage: int | None, parallel_output: bool
) -> Model:
    return kind(
        config=config,
        transformer_layer_spec=block_spec(config, vp_stage),
        vocab_size=run.model.padded_vocab_size,
        softmax_vocab_size=run.model.softmax_vocab_size,
        max_sequence_length=run.model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=not run.model.untie_embeddings_and_output_weights,
        position_embedding_type=run.model.position_embedding_type,
        rotary_percent=run.model.rotary_percent,
        rotary_base=run.model.rotary_base,
        rope_scaling=run.model.use_rope_scaling,
        rope_scaling_factor=run.model.rope_scaling_factor,
        seq_len_interpolation_factor=run.model.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
    )


def regularized(chunks: list[PanguModel], flags: OptimizerConfig) -> list[PanguModel]:
    """The chunks, with the z-loss and without the weight decay of embeddings, if the flags ask for that."""
    for chunk in chunks:
        chunk.z_loss = flags.z_loss_coeff
        for name, parameter in chunk.named_parameters():
            # An output layer that is tied to the embedding has a copy of it on the last pipeline stage.
            embeds = "embedding" in name or getattr(parameter, "shared_embedding", False)
            if embeds and not flags.decay_embeddings:
                parameter.no_weight_decay = True
    return chunks


def half_precision(chunks: list[PanguModel], config: PanguProConfig) -> list[nn.Module]:
    """Casts around each chunk where bf16 or fp16 is asked for."""
    return [Float16Module(config, chunk) for chunk in chunks] if config.fp16 or config.bf16 else chunks


def ddp_config(run: RunConfig) -> DistributedDataParallelConfig:
    """How gradients are kept and reduced over the data parallel ranks."""
    values = fields_of(run, DistributedDataParallelConfig)
    return DistributedDataParallelConfig(
        **values
        | {
            "grad_reduce_in_fp32": run.parallel.accumulate_allreduce_grads_in_fp32,
            # Megatron-Core's check raises on one rank while the others wait for its gradients;
            # training/step.py checks with all ranks agreeing.
            "check_for_nan_in_grad": False,
            "bucket_size": run.parallel.ddp_bucket_size,
            "pad_buckets_for_high_nccl_busbw": run.parallel.ddp_pad_buckets_for_high_nccl_busbw,
            "average_in_collective": run.parallel.ddp_average_in_collective,
            "align_param_gather": run.parallel.align_param_gather,
        }
    )


def wrap_for_training(
    chunks: list[PanguModel], config: PanguProConfig, ddp_config: DistributedDataParallelConfig
) -> list[DistributedDataParallel]:
    """Half precision casts where asked for, and Megatron-Core's data parallelism around each chunk."""
    wrapped = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=chunk,
            # Only the first chunk's buckets can be reduced while later ones still compute.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(half_precision(chunks, config))
    ]
    for chunk in wrapped:
        sum_weight_gradients_in_place(chunk)
    return wrapped


def sum_weight_gradients_in_place(model: nn.Module) -> None:
    """Let linear layers add their weights' gradients straight to where they are summed.

    That is data parallelism's buffer; a model without one (or ``--no-gradient-accumulation-fusion``)
    gets its gradients from autograd, as any other. Megatron-Core's and Transformer Engine's layers
    know this under different names.
    """
    for module in model.modules():
        for switch in ("gradient_accumulation_fusion", "fuse_wgrad_accumulation"):
            if hasattr(module, switch):
                wanted = module.config.gradient_accumulation_fusion
                setattr(module, switch, wanted and hasattr(module.weight, "main_grad"))


def unwrap(module: nn.Module) -> PanguModel:
    """The model inside data parallel and half precision wrappers."""
    while hasattr(module, "module"):
        module = module.module
    return module
