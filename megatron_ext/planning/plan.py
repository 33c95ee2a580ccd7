"""Estimates whether a layout fits, how long a step takes, and which layouts suit N devices.

The machines' figures are from their data sheets; the fractions of them that a run achieves are two
assumptions below, not measurements. ``Machine.scaled`` uses measured speeds instead (tools/doctor.py
--speed).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ext.config.describe import Layout, parameters_of_rank
from megatron_ext.config.footprint import memory
from megatron_ext.config.model import ModelConfig
from megatron_ext.planning.communication import bytes_sent

#: Fractions of the data sheet's matmul speed and link speeds that a training step achieves.
MATMUL_SHARE, LINK_SHARE = 0.55, 0.8
#: Fraction of a device's memory that a plan may use; the rest is for workspaces and fragmentation.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Machine:
    """A device and its links: memory in bytes, speeds in FLOP/s and bytes per second."""

    memory: float
    flops: float
    """Sustained in matmuls."""
    memory_speed: float
    near: float
    """One way, between devices of a host."""
    far: float
    """One way, between hosts, for each device."""
    devices_per_host: int = 8

    def scaled(self, flops: float | None, near: float | None, far: float | None) -> "Machine":
        """The machine with measured speeds instead of assumed ones."""
        return replace(self, flops=flops or self.flops, near=near or self.near, far=far or self.far)


def _gpu(memory: float, flops: float, memory_speed: float, near: float, far: float) -> Machine:
    return Machine(memory, MATMUL_SHARE * flops, memory_speed, LINK_SHARE * near, LINK_SHARE * far)


#: Dense bf16; NVLink one way; a 400 Gb/s (A100: 200) network adapter for each GPU.
MACHINES = {
    "h100": _gpu(80e9, 989e12, 3.35e12, 450e9, 50e9),
    "h200": _gpu(141e9, 989e12, 4.8e12, 450e9, 50e9),
    "a100": _gpu(80e9, 312e12, 2.0e12, 300e9, 25e9),
    "cpu": Machine(16e9, 0.05e12, 20e9, 2e9, 1e9),
}


def fits(model: ModelConfig, layout: Layout, machine: Machine) -> bool:
    """Whether the pipeline stage that needs most memory fits on its device."""
    return sum(memory(model, layout).values()) < MEMORY_SHARE * machine.memory


def step_seconds(
    model: ModelConfig, layout: Layout, machine: Machine, overlap: bool = True
) -> dict[str, float]:
    """Component -> seconds of one optimizer step; the sum is the whole step.

    Tensor parallel all-reduces are not overlapped. With ``overlap`` the data parallel communication is hidden
    by the backward pass of the last micro batch. The pipeline bubble is (stages - 1) times the micro batch of
    a chunk (1F1B, or interleaved with several chunks).
    """
    devices = layout.tensor * layout.pipeline * layout.data
    tokens = layout.micro_batch * layout.micro_batches * layout.data * layout.seq_length
    again = 4 / 3 if layout.recompute else 1
    compute = again * model.flops_per_token(layout.seq_length) * tokens / devices / machine.flops
    sent = bytes_sent(model, layout)
    model_is_near = layout.tensor * layout.pipeline <= machine.devices_per_host
    tensor = sent["tensor"] / (machine.near if layout.tensor <= machine.devices_per_host else machine.far)
    pipeline = sent["pipeline"] / (machine.near if model_is_near else machine.far)
    data = sent["data"] / (machine.near if devices <= machine.devices_per_host else machine.far)
    if overlap:
        data = max(0.0, data - compute * 2 / 3 / layout.micro_batches)
    held = max(parameters_of_rank(model, layout, stage) for stage in range(layout.pipeline))
    share, chunks = layout.data if layout.distributed_optimizer else 1, len(layout.chunks(model, 0))
    return {
        "computation": compute,
        "pipeline idle": (compute + tensor) * (layout.pipeline - 1) / layout.micro_batches / chunks,
        "tensor parallel": tensor,
        "pipeline sends": pipeline,
        "data parallel": data,
        # Reads the gradient, main weight and two moments; writes the last three and the weight.
        "optimizer": held / share * 30 / machine.memory_speed,
    }


def suggestions(
    model: ModelConfig,
    devices: int,
    global_batch: int,
    machine: Machine,
    seq_length: int,
    bytes_each: int = 2,
    kernels: bool = True,
) -> Iterator[tuple[float, Layout]]:
    """(seconds per step, layout) of the layouts on ``devices`` that fit, fastest first."""
    fitting = []
    for layout in _layouts(model, devices, global_batch, machine, seq_length):
        layout = replace(layout, bytes_each=bytes_each, kernels=kernels)
        if fits(model, layout, machine):
            fitting.append((sum(step_seconds(model, layout, machine).values()), layout))
    # Among equally fast layouts the least divided comes first.
    yield from sorted(fitting, key=lambda f: (f[0], f[1].tensor, f[1].pipeline, f[1].micro_batch))


def _layouts(
    model: ModelConfig, devices: int, global_batch: int, machine: Machine, seq_length: int
) -> Iterator[Layout]:
    """Every division of model and batch without remainder, with tensor parallelism within a host."""
    for tensor in _divisors(devices):
        split = (model.num_attention_heads, model.ffn_hidden_size, model.vocab_rows, seq_length)
        if tensor > machine.devices_per_host or any(size % tensor for size in split):
            continue
        for pipeline in _divisors(devices // tensor):
            data = devices // tensor // pipeline
            if model.num_layers % pipeline or global_batch % data:
                continue
            for micro_batch in _divisors(global_batch // data):
                if micro_batch > 64:
                    continue
                for recompute in (False, True):
                    yield Layout(
                        tensor=tensor,
                        pipeline=pipeline,
                        data=data,
                        sequence_parallel=tensor > 1,
                        distributed_optimizer=data > 1,
                        recompute=recompute,
                        micro_batch=micro_batch,
                        micro_batches=global_batch // data // micro_batch,
                        seq_length=seq_length,
                    )


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
