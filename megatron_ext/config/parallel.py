"""How the model is spread over processes, and how its activations are kept."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.flags import flag

MODEL_PARALLEL_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "sequence_parallel",
    "microbatch_group_size_per_vp_stage",
    "cross_entropy_loss_fusion",
    "deterministic_mode",
    "use_cpu_initialization",
)
PIPELINE_SPLIT_FIELDS = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
GRAPH_FIELDS = ("cuda_graph_impl", "cuda_graph_warmup_steps")
RECOMPUTE_FIELDS = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
)


@dataclass
class PipelineArguments:
    """Layers per stage and the interleaved schedule."""

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one virtual stage; gives each pipeline rank several stages (interleaved schedule)."""

    num_virtual_stages_per_pipeline_rank: int | None = None
    """The same as a number of virtual stages for each pipeline rank."""

    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first pipeline stage; the others share the rest equally."""

    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last pipeline stage; the others share the rest equally."""

    overlap_p2p_comm: bool = flag(True, "--no-overlap-p2p-communication")
    """Do not overlap the interleaved schedule's sends and receives with computation."""

    cp_comm_type: list[str] = flag(["p2p"], choices=["p2p", "a2a", "all_gather"])
    """How context parallel ranks exchange keys and values."""


@dataclass
class DataParallelArguments:
    """Gradients and optimizer state over the data parallel ranks."""

    use_distributed_optimizer: bool = False
    """Divide the optimizer's state among the data parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""

    overlap_param_gather: bool = False
    """Gather the distributed optimizer's parameters while the forward pass runs."""

    align_grad_reduce: bool = flag(True, "--no-align-grad-reduce")
    """Let each pipeline stage reduce its gradients when it is ready, not all at once."""

    align_param_gather: bool = flag(True, "--no-align-param-gather")
    """Let each pipeline stage gather its parameters when it is ready, not all at once."""

    ddp_bucket_size: int | None = None
    """Parameters in a bucket; by default max(40000000, 1000000 * data parallel size)."""

    ddp_pad_buckets_for_high_nccl_busbw: bool = False
    """Pad buckets to a multiple of 2^16 elements, which NCCL's ring prefers."""

    ddp_average_in_collective: bool = False
    """Average gradients in the collective instead of scaling them first."""

    accumulate_allreduce_grads_in_fp32: bool = False
    """Accumulate and reduce gradients in fp32; --bf16 switches it on."""

    grad_reduce_in_bf16: bool = False
    """Reduce gradients in bf16, against the default of --bf16."""


@dataclass
class RecomputeArguments:
    """Short form of selective recomputation."""

    recompute_activations: bool = False
    """The same as --recompute-granularity selective."""


@dataclass
class ProcessArguments:
    """The processes of the job."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Backend of torch.distributed; by default the one of the device."""

    distributed_timeout_minutes: int = 10
    """Minutes after which a collective that does not come to an end fails."""

    watchdog_minutes: float | None = None
    """Minutes without progress after which the ranks report where they stand; by default half of
    --distributed-timeout-minutes, 0 never."""

    distributed_timeout_seconds_after_init: int | None = None
    """Seconds after which a collective fails once training has begun; set-up keeps
    --distributed-timeout-minutes, because reading data and checkpoints takes its time."""

    local_rank: int | None = None
    """Rank within the host; by default what the launcher put in the environment."""
