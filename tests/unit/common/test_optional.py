"""Optional packages that are broken, or need a GPU, count as not installed."""

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext import platform
from megatron_ext.common import optional
from megatron_ext.platform import engine
from tests.conftest import REPOSITORY

ERRORS = ("ImportError", "RuntimeError", "OSError", "AssertionError", "AttributeError")
BROKEN = sorted(optional.PACKAGES - {"transformer_engine"})

#: Starts as a run does, on a machine whose torch sees a GPU or not, and says what is used.
START = """
import json, sys, warnings
warnings.simplefilter("ignore")
import megatron_ext
import torch
device, gpu = sys.argv[1:]
torch.cuda.is_available = lambda: bool(int(gpu))
from megatron_ext import platform
chosen = platform.activate(device)
import megatron_ext.training.setup, megatron_ext.training.loop, megatron_ext.kernels.triton_language
from megatron.core import optimizer
from megatron.core.extensions import transformer_engine
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers, random
print(json.dumps({
    "device": chosen,
    "engine": [transformer_engine.HAVE_TE, layers.HAVE_TE, random.HAVE_TE],
    "apex": layers._grad_accum_fusion_available and chosen == "cuda",
    "norm": clip_grads.l2_norm_impl.__module__.split(".")[0],
    "adam": optimizer.Adam.__module__.split(".")[0],
    "triton": megatron_ext.kernels.triton_language.available(),
}))
"""
NONE_USED = {"engine": [False] * 3, "apex": False, "adam": "torch"}


def started(folder: Path, device: str, gpu: bool) -> subprocess.Popen:
    """START with the packages of ``folder`` installed."""
    return subprocess.Popen(
        [sys.executable, "-c", START, device, str(int(gpu))],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen) -> tuple[dict, str]:
    """The output of the process, and its warnings."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1]), errors


def install(folder: Path, name: str, content: str, version: str = "2.11.0") -> None:
    """A package that runs ``content`` when it, or its module ``pytorch``, is imported."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("" if name == "transformer_engine" else content)
    (folder / name / "pytorch.py").write_text(content)
    described = folder / f"{name}-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(("device", "gpu"), [("auto", True), ("cpu", False)], ids=["gpu", "cpu"])
def test_broken_packages_stop_no_run(tmp_path, device, gpu):
    """Every package is broken, in a way that follows from its place in the list."""
    for place, name in enumerate(("transformer_engine", *BROKEN)):
        kind = ERRORS[(place + gpu) % len(ERRORS)]
        install(tmp_path, name, f"raise {kind}('{name} was built for another machine')")
    found, warned = said(started(tmp_path, device, gpu))
    assert found["device"] == ("cuda" if gpu else "cpu")
    assert found.items() >= NONE_USED.items() and not found["triton"]
    assert warned.count("triton is installed, but importing triton fails") == 1, warned


def test_packages_for_gpus_are_not_there_on_a_cpu(tmp_path):
    """They import without error, but would receive CPU tensors; torch sees a GPU."""
    for name in optional.GPU_ONLY:
        install(tmp_path, name, "raise SystemExit('imported')")
    found, _ = said(started(tmp_path, "cpu", gpu=True))
    assert found.items() >= NONE_USED.items() and found["norm"] == "megatron_ext"


@pytest.mark.parametrize("problem", [None, "2.8 is too old"])
def test_an_engine_with_a_problem_is_not_there_on_a_gpu(monkeypatch, problem):
    monkeypatch.setattr(platform.device, "_device_type", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine, "problem", lambda on_gpu: problem)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    assert platform.activate("auto") == "cuda"
    assert ("transformer_engine" in sys.modules) == (problem is not None)


@pytest.fixture
def guarded(monkeypatch, tmp_path):
    """A folder for packages that replace Triton."""
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "triton"}
    for name in kept:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        del sys.modules[name]


def test_a_package_that_works_is_as_it_was(guarded):
    (guarded / "triton").mkdir()
    (guarded / "triton" / "__init__.py").write_text("from triton.language import answer")
    (guarded / "triton" / "language.py").write_text("answer = 42")
    import triton

    assert triton.answer == 42
    for module in (triton, triton.language):
        assert type(module.__loader__) is type(module.__spec__.loader) is type(ast.__loader__)


@pytest.mark.parametrize("kind", ERRORS)
def test_any_failure_is_that_of_a_missing_package(guarded, caplog, monkeypatch, kind):
    monkeypatch.setattr(optional, "_warned", set())
    (guarded / "triton").mkdir()
    (guarded / "triton" / "__init__.py").write_text("")
    (guarded / "triton" / "language.py").write_text(f"raise {kind}('of another CUDA')")
    for _ in range(2):
        with pytest.raises(
            ModuleNotFoundError, match=rf"importing triton.language fails \({kind}: of another CUDA\)"
        ):
            importlib.import_module("triton.language")
    assert len(caplog.records) == 1


def test_what_is_merely_missing_is_not_called_broken(guarded, caplog):
    (guarded / "triton.py").write_text("import a_package_that_is_nowhere")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_nowhere"):
        importlib.import_module("triton")
    assert not caplog.records


def optional_imports(path: Path) -> set[str]:
    """The packages that a module imports within a try statement."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for inner in ast.walk(node) if isinstance(node, ast.Try) else ():
            if isinstance(inner, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom) and not inner.level:
                found.add(inner.module.partition(".")[0])
    return found


def test_every_optional_package_of_megatron_core_is_guarded():
    """All that a module of it imports within a try statement, if the module is part of this program."""
    # In a process of its own: other tests load more of it.
    loaded = (
        "[m.__file__ for n, m in sys.modules.items() if n.startswith('megatron.core.') and m.__spec__.origin]"
    )
    code = f"import sys, megatron_ext.training.setup; print(*filter(None, {loaded}), sep='\\n')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    paths = [Path(line) for line in done.stdout.splitlines() if line.endswith(".py")]
    tried = set().union(*map(optional_imports, paths))
    needed = {name for name in tried if importlib.util.find_spec(name) is not None} | {"megatron"}
    assert len(paths) > 100 and tried - needed <= optional.PACKAGES
    assert engine.OLDEST == (2, 9)
