"""Optional packages of Megatron-Core: a broken one counts as missing.

Megatron-Core tries to import these packages in many of its modules, and expects ModuleNotFoundError if one is
missing. A package that is installed for another device, torch or CUDA raises other errors, or imports and
then fails when a kernel receives a CPU tensor. Here every failing import of these packages raises
ModuleNotFoundError, and on a CPU the packages that compute on GPUs cannot be imported at all.
"""

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

#: Packages whose kernels run only on a GPU.
GPU_ONLY = frozenset(
    """
    amp_C apex causal_conv1d cudnn deep_ep fast_hadamard_transform flash_attn flash_attn_3 flash_mla
    flashattn_hopper flashinfer flashinfer_cubin flashinfer_jit_cache fused_weight_gradient_mlp_cuda
    grouped_gemm mamba_ssm nvshmem scaled_masked_softmax_cuda scaled_softmax_cuda
    scaled_upper_triang_masked_softmax_cuda torch_memory_saver transformer_engine transformer_engine_torch
    """.split()
)
#: Packages that are also useful on a CPU, or that torch itself imports (cuda).
OTHERS = frozenset(
    """
    boto3 botocore cuda einops emerging_optimizers modelopt multistorageclient nvidia_resiliency_ext nvtx
    triton wandb zmq
    """.split()
)
PACKAGES = GPU_ONLY | OTHERS


class Guard(importlib.abc.MetaPathFinder):
    """Finds the modules of ``PACKAGES`` through the next finders, and guards their execution."""

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
    """Wraps a loader and turns all of its errors into ModuleNotFoundError."""

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


_warned: set[str] = set()


def _missing(name: str, error: Exception) -> ModuleNotFoundError:
    """The ModuleNotFoundError for ``error``; warns once per package, unless it is just missing."""
    if isinstance(error, ModuleNotFoundError):
        return error
    package = name.partition(".")[0]
    reason = f"{package} is installed, but importing {name} fails ({type(error).__name__}: {error})"
    if package not in _warned:
        _warned.add(package)
        logger.warning("%s: it is not used", reason)
    return ModuleNotFoundError(reason, name=name)


def install() -> None:
    """Guard the imports of this process."""
    if not any(isinstance(finder, Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, Guard())


def block(*packages: str) -> None:
    """Make imports of these packages raise ModuleNotFoundError from now on."""
    for package in packages:
        sys.modules[package] = None  # type: ignore[assignment]
