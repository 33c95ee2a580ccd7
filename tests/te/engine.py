"""Transformer Engine's own Python over a C++ module that is replaced by a few functions of torch.

For these tests alone. It shows how the project and Megatron-Core use Transformer Engine: constructors,
names, marks, initial values, checkpoints, optimizer groups. It shows nothing of its kernels, and no FP8.

Its modules are imported as Megatron-Core's are on a CPU (megatron_ext/platform/loader.py): where they say
CUDA they see the CPU. The functions of the C++ module are in kernels.py; one that is not there says so when
it is called.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path
from unittest import mock

import torch

from megatron_ext import platform
from megatron_ext.platform import loader
from megatron_ext.platform.cpu_device import TorchView
from megatron_ext.platform.seams import DEVICE, Seam
from tests.te import kernels

PACKAGE = "transformer_engine"
CPP_MODULE = "transformer_engine_torch"
#: Packages that Transformer Engine imports for parts that are not used here; nobody else sees them.
UNUSED = ("einops", "onnx", "onnxscript", "triton")


class Absent:
    """Stands for what is not replaced: it has any attribute, and cannot be called."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Absent) and other._name == self._name

    def __hash__(self) -> int:
        return hash(self._name)

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self._name} is not replaced for the CPU (tests/te/kernels.py)")


class AbsentModule(types.ModuleType):
    """A module of which everything is :class:`Absent`, except what is set."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


class _UnusedFinder(importlib.abc.MetaPathFinder):
    """Finds the packages that nothing is asked of."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(fullname, _UnusedLoader(), is_package=True)
        return None


class _UnusedLoader(importlib.abc.Loader):
    """Gives a package of which anything may be asked at import: nothing of it runs later."""

    def create_module(self, spec):
        return mock.MagicMock(__path__=[], __version__="3.6.0")

    def exec_module(self, module):
        pass


class _EngineFinder(loader.CpuFinder):
    """Finds Transformer Engine's modules."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _EngineLoader(fullname, spec.loader.path, self.torch_view)
        return spec


class _EngineLoader(loader.CpuLoader):
    """Loads one module of Transformer Engine for a CPU."""

    def get_code(self, fullname):
        code = importlib.machinery.SourceFileLoader.get_code(self, fullname)
        return loader.rewrite(code, Seam(fullname, "", DEVICE, names={"is_cuda": "is_cpu"}))

    def exec_module(self, module):
        super().exec_module(module)
        if module.__name__ == f"{PACKAGE}.common":
            module.load_framework_extension = lambda framework: None
        if module.__name__ == f"{PACKAGE}.pytorch.utils":
            module._empty_tensor = lambda: torch.empty(0)
            module.canonicalize_device = lambda device: torch.device("cpu")


def _cpp_module() -> types.ModuleType:
    module = AbsentModule(CPP_MODULE)
    vars(module).update({name: value for name, value in vars(kernels).items() if not name.startswith("_")})
    for name in ("CommOverlapCore", "CommOverlap", "CommOverlapP2P", "CommOverlapHelper"):
        setattr(module, name, type(name, (), {}))
    module.get_cudnn_version = lambda: 91500
    module.get_fused_attn_backend = lambda *args: module.NVTE_Fused_Attn_Backend.NVTE_No_Backend
    module.get_cublasLt_version = lambda: 130000
    return module


def install(folder: Path) -> None:
    """Make the Transformer Engine unpacked in ``folder`` importable; before Megatron-Core is imported."""
    assert not any(name.startswith(loader.PACKAGE) for name in sys.modules), "Megatron-Core was imported"
    platform.activate("cpu")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it loads no shared libraries then
    os.environ["NVTE_FRAMEWORK"] = "pytorch"
    view = TorchView()
    view.cuda.is_available = lambda: True
    view.cuda.is_current_stream_capturing = lambda: False
    view.cuda.get_device_capability = lambda device=None: (9, 0)
    view.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="CPU"
    )
    sys.path.append(str(folder))
    unused = _UnusedFinder()
    sys.meta_path[:0] = [_EngineFinder(view), unused]
    _forget(PACKAGE, *UNUSED)
    sys.modules[CPP_MODULE] = _cpp_module()
    importlib.import_module(f"{PACKAGE}.pytorch")
    sys.meta_path.remove(unused)
    _forget(*UNUSED)


def _forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
