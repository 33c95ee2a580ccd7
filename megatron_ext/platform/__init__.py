"""The only package that knows a CPU from a GPU, and which optional packages are usable.

``import megatron_ext`` makes Megatron-Core importable on a CPU: its modules then see a CPU where
they say CUDA (``loader.py``, ``seams.py``). On a GPU Megatron-Core is not changed. On either device, an
optional package that cannot be used counts as missing (``common/optional.py``).

The modules are split by subject; callers write ``platform.on_gpu()``. Torch is imported inside functions, so
that importing the package costs nothing.
"""

from megatron_ext.platform.device import (
    Device,
    PlatformError,
    activate,
    check_megatron_core_version,
    current_device,
    device_name,
    install,
    on_gpu,
    side_stream,
    synchronize,
    use_rank_device,
)
from megatron_ext.platform.memory import (
    device_memory_bytes,
    empty_cache,
    keep_freed_memory,
    max_memory_bytes,
    max_resident_bytes,
)
from megatron_ext.platform.process_group import (
    default_backend,
    group_timeout,
    init_process_group,
    link_backend,
)
from megatron_ext.platform.profiling import NsysWindow, dump_memory_history, record_memory_history
from megatron_ext.platform.rng import rng_state, seed_all, set_rng_state

__all__ = [
    "Device",
    "NsysWindow",
    "PlatformError",
    "activate",
    "check_megatron_core_version",
    "current_device",
    "default_backend",
    "device_memory_bytes",
    "device_name",
    "dump_memory_history",
    "empty_cache",
    "group_timeout",
    "init_process_group",
    "install",
    "keep_freed_memory",
    "link_backend",
    "max_memory_bytes",
    "max_resident_bytes",
    "on_gpu",
    "record_memory_history",
    "rng_state",
    "seed_all",
    "set_rng_state",
    "side_stream",
    "synchronize",
    "use_rank_device",
]
