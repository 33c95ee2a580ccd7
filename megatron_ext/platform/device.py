"""The device of this process: its choice, streams and name.

``activate("cpu")`` or ``activate("cuda")``, called before the first import of Megatron-Core,
overrides the automatic choice.
"""

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from megatron_ext.common import optional
from megatron_ext.common.errors import RunError
from megatron_ext.platform import engine, environment, loader
from megatron_ext.platform.seams import SEAMS, SUPPORTED_MEGATRON_CORE

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
Device = Literal["cpu", "cuda"]
_device_type: Device | None = None


class PlatformError(RunError):
    """The machine or its installed packages cannot run the requested configuration."""


class _FirstImport(loader.importlib.abc.MetaPathFinder):
    """Chooses the device if Megatron-Core is imported before ``activate`` was called."""

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

    ``"auto"`` chooses a GPU if torch sees one. On a GPU, ``variables`` are added to the environment
    unless they are already set (``environment.py``).

    Raises:
        PlatformError: an earlier call chose the other device, Megatron-Core was imported before the first
            call, or its version is one whose seams were not checked.
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
        # Before the first kernel, and before Transformer Engine is imported.
        environment.apply(variables or {})
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
    # It warns at each dropout that the CPU's generator moved while a GPU's was meant to: here they are one.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: not record.getMessage().startswith("CPU RNG state changed")
    )


def check_megatron_core_version() -> None:
    """Refuse a Megatron-Core whose seams were not checked; warn of one that is not the supported one."""
    version = engine.version_of("megatron-core")
    if version is None:
        raise PlatformError("megatron-core is not installed; pip install -c constraints.txt .")
    tested = f"this program is tested with {SUPPORTED_MEGATRON_CORE}"
    install = f"pip install megatron-core=={SUPPORTED_MEGATRON_CORE}"
    if version not in SEAMS:
        raise PlatformError(f"megatron-core {version} is installed, but {tested}; {install}")
    if version != SUPPORTED_MEGATRON_CORE:
        logger.warning(
            "megatron-core %s: %s; docs/engine.md lists what differs; %s", version, tested, install
        )


def on_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return activate() == "cuda"


def current_device() -> "torch.device":
    """The ``torch.device`` of this process."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def use_rank_device(local_rank: int) -> None:
    """Use GPU ``local_rank``, modulo the number of GPUs; does nothing on a CPU."""
    if on_gpu():
        import torch

        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def device_name() -> str:
    """The GPU's name, or cpu."""
    if on_gpu():
        import torch

        return torch.cuda.get_device_name()
    return "cpu"


def synchronize() -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    if on_gpu():
        import torch

        torch.cuda.synchronize()


def side_stream() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context manager for copies from the device in another thread.

    A copy made inside the context sees all work that was queued before this call, does not wait for later
    work, and is complete when the context ends. On a CPU a copy is complete when it returns.
    """
    if not on_gpu():
        return contextlib.nullcontext
    import torch

    device, computed = torch.cuda.current_device(), torch.cuda.current_stream().record_event()

    @contextlib.contextmanager
    def on_side_stream() -> Iterator[None]:
        stream = torch.cuda.Stream(device)
        stream.wait_event(computed)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
        stream.synchronize()

    return on_side_stream
