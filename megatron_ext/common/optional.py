"""Packages that Megatron-Core uses where it finds them: a broken one counts as missing.

Megatron-Core tries to import each of these, in many of its modules, and expects a missing one to raise
ModuleNotFoundError. One that is installed but made for another device, torch or CUDA raises whatever its
own check raises, or works until a kernel is given a tensor of the CPU. So here an import of theirs that
fails in any way raises ModuleNotFoundError, and on a CPU those that compute on GPUs are not there at all.
"""

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

#: Packages whose kernels run on a GPU alone.
GPU_ONLY = frozenset(
    """
    amp_C apex causal_conv1d cudnn deep_ep emerging_optimizers fast_hadamard_transform flash_attn
    flash_attn_3 flash_mla flashattn_hopper flashinfer fused_weight_gradient_mlp_cuda grouped_gemm mamba_ssm
    nvshmem scaled_masked_softmax_cuda scaled_softmax_cuda scaled_upper_triang_masked_softmax_cuda
    torch_memory_saver transformer_engine transformer_engine_torch
    """.split()
)
#: Packages that are of use on a CPU too, or that torch imports by itself (cuda).
OTHERS = frozenset(
    """
    boto3 botocore cuda einops modelopt multistorageclient nvidia_resiliency_ext nvtx triton wandb zmq
    """.split()
)
PACKAGES = GPU_ONLY | OTHERS


class Guard(importlib.abc.MetaPathFinder):
    """Lets the modules of ``PACKAGES`` be found by the finders after it, and guards their execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:  # a folder without __init__.py has nothing to run
                    spec.loader = _GuardedLoader(spec.loader)
                return spec
        return None


class _GuardedLoader(importlib.abc.Loader):
    """Another loader, whose every failure is a ModuleNotFoundError."""

    def __init__(self, inner: importlib.abc.Loader):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        try:
            return self._inner.create_module(spec)
        except Exception as error:
            raise _missing(spec.name, error) from error

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._inner.exec_module(module)
        except Exception as error:
            raise _missing(module.__name__, error) from error
        assert module.__spec__ is not None  # the import system sets it
        module.__spec__.loader = module.__loader__ = self._inner


_told: set[str] = set()


def _missing(name: str, error: Exception) -> ModuleNotFoundError:
    """The error that stands for ``error``, which is told once a package; what is just missing is not."""
    if isinstance(error, ModuleNotFoundError):
        return error
    package = name.partition(".")[0]
    reason = f"{package} is installed, but importing {name} fails ({type(error).__name__}: {error})"
    if package not in _told:
        _told.add(package)
        logger.warning("%s: it is not used", reason)
    return ModuleNotFoundError(reason, name=name)


def install() -> None:
    """Guard the imports of this process."""
    if not any(isinstance(finder, Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, Guard())


def block(*packages: str) -> None:
    """From here on an import of these packages says that they are not there."""
    for package in packages:
        sys.modules[package] = None  # type: ignore[assignment]
