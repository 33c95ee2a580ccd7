"""Memory of the device and of the host."""

import os
import sys

from megatron_ext.platform.device import on_gpu


def max_memory_bytes() -> int:
    """Peak memory of this process so far: device memory on a GPU, resident memory on a CPU."""
    if on_gpu():
        import torch

        return torch.cuda.max_memory_allocated()
    return max_resident_bytes()


def max_resident_bytes() -> int:
    """Peak resident memory of this process so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory_bytes() -> int:
    """Memory available to this process: its GPU's, or its share of the host's free memory."""
    if on_gpu():
        import torch

        return torch.cuda.mem_get_info()[1]
    import psutil

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step, as a GPU's caching allocator does.

    By default glibc returns large blocks to the system at once, and the system zeroes each page again when it
    is next written: about 6 % of a small model's step. Blocks of a GiB and more are still returned.
    """
    if on_gpu() or not sys.platform.startswith("linux"):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library has it
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)


def empty_cache() -> None:
    """Release cached device memory."""
    if on_gpu():
        import torch

        torch.cuda.empty_cache()
