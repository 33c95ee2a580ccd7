"""Parallelism, and the processes of the job."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.common.flags import derived, flag
from megatron_ext.config.needs import BF16, CONTEXT, INTERLEAVED, OVERLAP, PIPELINE


@dataclass(kw_only=True)
class ParallelConfig:
    """Tensor, pipeline, context and data parallelism."""

    tensor_model_parallel_size: int = flag(1, minimum=1)
    """Number of processes among which each weight matrix is divided."""

    pipeline_model_parallel_size: int = flag(1, minimum=1)
    """Number of processes among which the layers are divided."""

    context_parallel_size: int = flag(1, minimum=1)
    """Number of processes among which each sequence is divided."""

    expert_model_parallel_size: int = flag(1, minimum=1)
    """Number of processes among which experts are divided; must be 1, as models here have no experts."""

    sequence_parallel: bool = False
    """Divide the residual stream along the sequence among the tensor parallel ranks (arXiv 2205.05198)."""

    num_layers_per_virtual_pipeline_stage: int | None = flag(None, minimum=1)
    """Layers of one virtual stage; gives each pipeline rank several stages (interleaved schedule)."""

    num_virtual_stages_per_pipeline_rank: int | None = flag(None, minimum=1)
    """Number of virtual stages of each pipeline rank; another way to give the same."""

    decoder_first_pipeline_num_layers: int | None = flag(None, minimum=1, needs=[PIPELINE])
    """Layers on the first pipeline stage; the other stages share the rest equally."""

    decoder_last_pipeline_num_layers: int | None = flag(None, minimum=1, needs=[PIPELINE])
    """Layers on the last pipeline stage; the other stages share the rest equally."""

    overlap_p2p_comm: bool = flag(True, "--no-overlap-p2p-communication", needs=[INTERLEAVED])
    """Do not overlap the interleaved schedule's sends and receives with computation."""

    cp_comm_type: list[str] = flag(["p2p"], choices=["p2p", "a2a", "all_gather"], needs=[CONTEXT])
    """How context parallel ranks exchange keys and values."""

    microbatch_group_size_per_vp_stage: int | None = flag(
        None, "--microbatch-group-size-per-virtual-pipeline-stage", minimum=1, needs=[INTERLEAVED]
    )
    """Micro batches that a virtual stage processes at a time; by default the number of pipeline stages."""

    account_for_embedding_in_pipeline_split: bool = flag(False, needs=[PIPELINE])
    """Count the embedding as a layer when the layers are divided among stages."""

    account_for_loss_in_pipeline_split: bool = flag(False, needs=[PIPELINE])
    """Count the output layer and the loss as a layer when the layers are divided among stages."""

    use_distributed_optimizer: bool = False
    """Divide the optimizer's state among the data parallel ranks."""

    overlap_grad_reduce: bool = False
    """Overlap the reduction of gradients with the backward pass."""

    overlap_param_gather: bool = False
    """Overlap the gathering of the distributed optimizer's parameters with the forward pass."""

    align_grad_reduce: bool = flag(True, "--no-align-grad-reduce", needs=[OVERLAP])
    """Let each pipeline stage reduce its gradients when it is ready, not all at once."""

    align_param_gather: bool = flag(True, "--no-align-param-gather")
    """Let each pipeline stage gather its parameters when it is ready, not all at once."""

    ddp_bucket_size: int | None = flag(None, minimum=1)
    """Parameters in a bucket; by default max(40000000, 1000000 * data parallel size)."""

    ddp_pad_buckets_for_high_nccl_busbw: bool = False
    """Pad buckets to a multiple of 2^16 elements, for NCCL's bus bandwidth."""

    ddp_average_in_collective: bool = False
    """Average gradients in the collective instead of scaling them first."""

    accumulate_allreduce_grads_in_fp32: bool = False
    """Accumulate and reduce gradients in fp32; implied by --bf16."""

    grad_reduce_in_bf16: bool = flag(False, needs=[BF16])
    """Reduce gradients in bf16, instead of fp32, with --bf16."""

    data_parallel_size: int = derived(1)
    """Number of copies of the model."""

    virtual_pipeline_model_parallel_size: int | None = derived(None)
    """Number of virtual stages per pipeline rank; None without the interleaved schedule."""

    @property
    def model_parallel_size(self) -> int:
        """Number of processes that hold one copy of the model."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )


@dataclass(kw_only=True)
class ProcessConfig:
    """The processes of the job and their devices."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto chooses a GPU if there is one."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Backend of torch.distributed; by default the one of the device."""

    distributed_timeout_minutes: int = flag(10, minimum=1)
    """Timeout of collectives, in minutes."""

    watchdog_minutes: float | None = flag(None, minimum=0)
    """Minutes without progress after which the ranks report their positions and stacks; by default half of
    --distributed-timeout-minutes; 0 never reports."""

    distributed_timeout_seconds_after_init: int | None = flag(None, minimum=1)
    """Timeout of collectives during training, in seconds; set-up keeps --distributed-timeout-minutes,
    because reading data and checkpoints can take long."""

    local_rank: int | None = None
    """Rank within the host; by default from the launcher's environment."""

    rank: int = derived(0)
    world_size: int = derived(1)

    gpu: Any = derived(None)
    """Compute capability and CUDA version of this process's GPU, if any (``platform.engine.gpu``)."""

    engine_problem: str | None = derived(None)
    """Why Transformer Engine cannot be used; None if it can."""

    has_transformer_engine: bool = derived(False)
