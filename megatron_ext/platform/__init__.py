"""The only place that knows a CPU from a GPU, and what is installed.

``import megatron_ext`` makes Megatron-Core importable on a CPU: its modules then see a CPU where
they say CUDA (``loader.py``, ``seams.py``). Where a GPU is used nothing of it is changed. On either, an
optional package that cannot be used counts as missing (``optional.py``).
``activate("cpu")`` or ``activate("cuda")``, called before the first import of Megatron-Core,
overrides what is found on the machine.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from megatron_ext.common import network, optional
from megatron_ext.common.errors import RunError
from megatron_ext.platform import engine, environment, loader, rendezvous
from megatron_ext.platform.seams import SUPPORTED_MEGATRON_CORE

if TYPE_CHECKING:
    import torch

Device = Literal["cpu", "cuda"]
_device_type: Device | None = None


class PlatformError(RunError):
    """The machine or its installed packages cannot run what was asked for."""


class _FirstImport(loader.importlib.abc.MetaPathFinder):
    """Settles the device when Megatron-Core is imported before anyone called ``activate``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == loader.PACKAGE and _device_type is None:
            activate()
            return importlib.util.find_spec(fullname)
        return None


def install() -> None:
    """Prepare the import of Megatron-Core; costs nothing until it is imported."""
    optional.install()
    if not any(isinstance(finder, _FirstImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FirstImport())


def activate(device: str = "auto", variables: Mapping[str, str] | None = None) -> Device:
    """Choose the device of this process, ``"cpu"`` or ``"cuda"``, and return it.

    ``variables`` are put into the environment, unless they are there, where a GPU is used
    (``environment.py``).

    ``"auto"`` takes a GPU if torch sees one. The first call decides; a later call that asks for
    the other device, or a Megatron-Core that was imported before, is a :class:`PlatformError`,
    as is a version of Megatron-Core whose seams were not checked.
    """
    global _device_type
    if device not in ("auto", "cpu", "cuda"):
        raise PlatformError(f"--device must be auto, cpu or cuda, not {device!r}")
    if _device_type is not None:
        if device not in ("auto", _device_type):
            raise PlatformError(f"this process already runs on {_device_type}, cannot change to {device}")
        if _device_type == "cuda":
            environment.apply(variables or {})
        return _device_type
    check_megatron_core_version()
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise PlatformError("--device cuda: torch sees no GPU; use --device cpu, or see tools/doctor.py")
    chosen: Device = "cuda" if available and device != "cpu" else "cpu"
    if chosen == "cuda":
        environment.apply(
            variables or {}
        )  # before the first kernel, and before Transformer Engine is imported
    if chosen == "cpu":
        _see_cpu()
        optional.block(*optional.GPU_ONLY)
    elif engine.problem(on_gpu=True):
        optional.block("transformer_engine")
    _device_type = chosen
    return chosen


def _see_cpu() -> None:
    early = loader.imported_too_early()
    if early:
        raise PlatformError(f"{early[0]} was imported before megatron_ext; import megatron_ext first")
    from megatron_ext.platform.cpu_device import TorchView

    sys.meta_path.insert(0, loader.CpuFinder(TorchView()))


def check_megatron_core_version() -> None:
    """Refuse a Megatron-Core that this platform layer was not tested with."""
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise PlatformError("megatron-core is not installed; pip install -c constraints.txt .") from None
    if version not in SUPPORTED_MEGATRON_CORE:
        raise PlatformError(
            f"megatron-core {version} is installed, but this version was tested with "
            f"{', '.join(SUPPORTED_MEGATRON_CORE)}; pip install megatron-core=={SUPPORTED_MEGATRON_CORE[-1]}"
        )


def on_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return activate() == "cuda"


def current_device() -> "torch.device":
    """The ``torch.device`` of this process."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def use_rank_device(local_rank: int) -> None:
    """Let a process compute on the GPU of its number; with fewer GPUs, or none, nothing changes."""
    if on_gpu():
        import torch

        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def link_backend() -> str:
    """The backend that two processes of this machine measure a link with: nccl needs a GPU each."""
    import torch

    return "nccl" if on_gpu() and torch.cuda.device_count() > 1 else "gloo"


def default_backend() -> str:
    """The backend of torch.distributed that belongs to the device: nccl or gloo."""
    return "nccl" if on_gpu() else "gloo"


def init_process_group(
    backend: str | None,
    rank: int,
    world_size: int,
    local_rank: int,
    timeout: timedelta,
    store: "torch.distributed.Store | None" = None,
) -> None:
    """Join the job's processes, which met at ``store``; alone, the process is a world of one.

    gloo, which Megatron-Core makes groups of beside those of nccl, is bound to the interface that leads to
    the first host (``network.py``), unless GLOO_SOCKET_IFNAME names one. A group that was joined before
    is kept.
    """
    import torch

    if torch.distributed.is_initialized():
        return
    if on_gpu():
        torch.cuda.set_device(local_rank)
    store = rendezvous.open_store(rank, world_size, timeout) if store is None else store
    backend = backend or default_backend()
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = network.gloo_interface(os.environ["MASTER_ADDR"])
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout
    )


def group_timeout(group: "torch.distributed.ProcessGroup") -> timedelta:
    """How long an operation of a process group may take."""
    return group._get_backend(current_device()).options._timeout


def side_stream() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """For copies from the device in another thread: each is made within a context that this returns.

    They see what was computed until now, wait for nothing that is computed later, and are complete at
    the end of the context. On a CPU a copy is complete when it returns.
    """
    if not on_gpu():
        return contextlib.nullcontext
    import torch

    device, computed = torch.cuda.current_device(), torch.cuda.current_stream().record_event()

    @contextlib.contextmanager
    def beside() -> Iterator[None]:
        stream = torch.cuda.Stream(device)
        stream.wait_event(computed)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
        stream.synchronize()

    return beside


def synchronize() -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    if on_gpu():
        import torch

        torch.cuda.synchronize()


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> "dict[str, torch.Tensor]":
    """The device's generator state, under the key that a checkpoint keeps it by."""
    import torch

    return {"device": torch.cuda.get_rng_state() if on_gpu() else torch.get_rng_state()}


def set_rng_state(state: "dict[str, torch.Tensor]") -> None:
    """Restore what :func:`rng_state` returned."""
    import torch

    (torch.cuda.set_rng_state if on_gpu() else torch.set_rng_state)(state["device"])


def max_memory_bytes() -> int:
    """The most memory this process has used so far: device memory on a GPU, else resident memory."""
    if on_gpu():
        import torch

        return torch.cuda.max_memory_allocated()
    return max_resident_bytes()


def max_resident_bytes() -> int:
    """The most of the host's memory that this process has held so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name() -> str:
    """The GPU's name, or cpu."""
    if on_gpu():
        import torch

        return torch.cuda.get_device_name()
    return "cpu"


def device_memory_bytes() -> int:
    """Memory that a process has: its GPU's, or its share of the host's that is free."""
    if on_gpu():
        import torch

        return torch.cuda.mem_get_info()[1]
    import psutil

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, for the next step to use, as a GPU's allocator does.

    glibc gives large blocks back at once, and each comes anew from the system, zeroed page by page
    as it is first written: some 6 % of a small model's step. Blocks of a GiB and more still go back.
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
    """Give cached device memory back."""
    if on_gpu():
        import torch

        torch.cuda.empty_cache()


class NsysWindow:
    """The part of a run that nsys captures (``--capture-range cudaProfilerApi``)."""

    def start(self) -> None:
        import torch

        torch.cuda.cudart().cudaProfilerStart()

    def stop(self) -> None:
        import torch

        torch.cuda.cudart().cudaProfilerStop()


def record_memory_history() -> None:
    """Record every allocation of GPU memory from here on."""
    import torch

    torch.cuda.memory._record_memory_history(True)


def dump_memory_history(path: str) -> None:
    """Write the record of GPU memory for pytorch.org/memory_viz."""
    import torch

    torch.cuda.memory._dump_snapshot(path)
