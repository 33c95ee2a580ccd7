"""Imports Megatron-Core so that its modules use the CPU where they name CUDA.

Two changes are made while a module below ``megatron.core`` is imported, and to no other module:

* ``import torch`` inside it yields a view of torch whose ``cuda`` answers for the CPU
  (``cpu_device.py``). Python looks ``__import__`` up in the module's own builtins, so giving the
  module its own builtins is enough.
* the string literals and attribute names listed in ``seams.py`` (``device="cuda"``,
  ``"torch.cuda.FloatTensor"``, ``.cuda()``) are replaced in the compiled code.
"""

import builtins
import importlib.abc
import importlib.machinery
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from types import CodeType, ModuleType

from megatron_ext.platform.seams import Seam, installed_seams

PACKAGE = "megatron.core"


def rewrite(code: CodeType, seam: Seam, replaced: set[str] | None = None) -> CodeType:
    """Return ``code`` with the constants and names of ``seam`` replaced, nested code included.

    ``replaced``, if given, collects the replaced names (a test checks that none is missing).
    """
    constants, names = seam.constants or {}, seam.names or {}

    def swap(value: object) -> object:
        if isinstance(value, CodeType):
            return rewrite(value, seam, replaced)
        if isinstance(value, tuple):
            return tuple(swap(item) for item in value)
        if isinstance(value, str) and value in constants:
            if replaced is not None:
                replaced.add(value)
            return constants[value]
        return value

    if replaced is not None:
        replaced.update(name for name in code.co_names if name in names)
    return code.replace(
        co_consts=tuple(swap(value) for value in code.co_consts),
        co_names=tuple(names.get(name, name) for name in code.co_names),
    )


class CpuLoader(importlib.machinery.SourceFileLoader):
    """Loads one module of Megatron-Core for a CPU."""

    def __init__(self, fullname: str, path: str, torch_view: ModuleType):
        super().__init__(fullname, path)
        self.torch_view = torch_view
        self.replaced: dict[str, object] = {}  # name -> upstream's own, for comparisons

    def get_code(self, fullname: str) -> CodeType | None:
        code = super().get_code(fullname)
        seam = installed_seams().get(fullname)
        return rewrite(code, seam) if seam and code else code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": self._import}
        super().exec_module(module)
        seam = installed_seams().get(module.__name__)
        for name, ours in (seam.functions or {} if seam else {}).items():
            self.replaced[name] = getattr(module, name, None)
            setattr(module, name, pkgutil.resolve_name(ours))

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        imported = builtins.__import__(name, globals, locals, fromlist, level)
        if level or name.partition(".")[0] != "torch":
            return imported
        if name == "torch" or not fromlist:
            return self.torch_view
        # `from torch.cuda import x` imports from the submodule itself.
        return self.torch_view.cuda if name == "torch.cuda" else imported


class CpuFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of Megatron-Core and loads them with ``CpuLoader``."""

    def __init__(self, torch_view: ModuleType):
        self.torch_view = torch_view

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = CpuLoader(fullname, spec.loader.path, self.torch_view)
        return spec


def imported_too_early() -> list[str]:
    """The modules of Megatron-Core that were imported before the platform was set up."""
    touching = (name for name in sys.modules if name.startswith(PACKAGE + "."))
    return sorted(name for name in touching if not isinstance(sys.modules[name].__loader__, CpuLoader))
