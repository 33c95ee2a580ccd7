"""Checks of this machine for tools/doctor.py, which change nothing.

Each check returns a :class:`Finding`. Packages whose import can fail badly, such as Transformer Engine on a
machine without a GPU, are imported in a separate process, and only if they could be used.
"""

import importlib.util
import os
import platform as python_platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_ext.common import network
from megatron_ext.platform import engine
from megatron_ext.platform.engine import version_of
from megatron_ext.platform.seams import SEAMS, SUPPORTED_MEGATRON_CORE


@dataclass(frozen=True)
class Finding:
    """The result of a check, and its consequence (``use``).

    ``state``: ok; absent (something else is used); warning (used, but untested); problem (a run fails).
    """

    name: str
    state: Literal["ok", "absent", "warning", "problem"]
    found: str
    use: str
    command: str = ""


def findings() -> Iterator[Finding]:
    """Run every check, in the order of the output."""
    for check in CHECKS:
        yield check()


def python() -> Finding:
    """The Python interpreter."""
    found = f"{python_platform.python_version()} on {python_platform.system()} {python_platform.machine()}"
    good = (3, 10) <= sys.version_info[:2] < (3, 13)
    command = "" if good else "PYTHON=python3.12 bash tools/setup.sh"
    return Finding("Python", "ok" if good else "problem", found, "3.10 to 3.12 are supported", command)


def torch() -> Finding:
    """torch, and the CUDA version that it was built for."""
    version = version_of("torch")
    if version is None:
        return Finding("torch", "problem", "not installed", "nothing runs without it", "bash tools/setup.sh")
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    return Finding("torch", "ok", f"{version}, {built}, {torch.get_num_threads()} threads", "computes")


def megatron_core() -> Finding:
    """Megatron-Core, whose seams are checked for certain versions."""
    version, name = version_of("megatron-core"), "Megatron-Core"
    install = f"pip install megatron-core=={SUPPORTED_MEGATRON_CORE}"
    if version is None:
        return Finding(name, "problem", "not installed", "nothing runs without it", install)
    if version == SUPPORTED_MEGATRON_CORE:
        return Finding(name, "ok", version, "the engine")
    tested = f"the program is tested with {SUPPORTED_MEGATRON_CORE}"
    if version in SEAMS:
        use = f"runs, as far as docs/engine.md says; {tested}"
        return Finding(name, "warning", version, use, install)
    return Finding(name, "problem", version, f"refused: {tested}", install)


def gpu() -> Finding:
    """GPUs, their driver, and whether torch sees them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    cards = [line for line in _output(query).splitlines() if line.strip()]
    seen = _gpu_count()
    if not cards and not seen:
        return Finding("GPU", "absent", "none", "--device cpu, fp32, gloo")
    found = f"{len(cards)} x {cards[0]}" if cards else f"{seen} seen by torch"
    if not seen:
        why = "torch sees none: its build is for CPUs, or for a newer driver"
        return Finding("GPU", "problem", found, why, "TORCH=default bash tools/setup.sh")
    import torch

    kernel = attention_kernel(
        version_of("torch"), torch.backends.cudnn.version(), torch.cuda.get_device_capability()
    )
    return Finding("GPU", "ok", found, f"--device cuda on {seen}, bf16, nccl; local attention by {kernel}")


def attention_kernel(torch_version: str | None, cudnn: int | None, capability: tuple[int, int]) -> str:
    """The kernel that torch's scaled_dot_product_attention prefers in half precision; it is not overridden.

    cuDNN's attention is the fastest on Hopper and Blackwell. torch prefers it there since 2.10, but only
    with cuDNN 9.15.1 or newer (torch's wheels since 2.11): older ones were wrong for some sequence lengths.
    """
    if capability[0] not in (9, 10):
        return "FlashAttention 2"
    first = engine.parse_version(torch_version or "0") >= (2, 10) and (cudnn or 0) > 91500
    return "cuDNN" if first else "FlashAttention 2; torch 2.11 or newer takes cuDNN's, which is faster"


def transformer_engine() -> Finding:
    """Transformer Engine: installed, in a version that Megatron-Core accepts, and importable."""
    version, name = version_of("transformer-engine"), "Transformer Engine"
    install = engine.INSTALL
    if version is None:
        use = "--transformer-impl local; no FP8, no context parallelism"
        return Finding(name, "absent", "not installed", use, install if _gpu_count() else "")
    if not _gpu_count():
        return Finding(name, "absent", version, "not imported without a GPU; --transformer-impl local")
    wanted = f"Megatron-Core asks for {engine.ACCEPTED}"
    if engine.parse_version(version) < engine.OLDEST:
        return Finding(name, "problem", f"{version} is too old", wanted, install)
    reason = _import_problem("transformer_engine.pytorch")
    if reason is not None:
        return Finding(name, "problem", f"{version} does not import: {reason}", "local layers", install)
    recipes = [recipe for recipe in engine.RECIPES if engine.recipe_problem(recipe, *engine.gpu()) is None]
    use = f"FP8 recipes {', '.join(recipes)}" if recipes else "this GPU has no FP8"
    if engine.parse_version(version) >= engine.TOO_NEW:
        return Finding(name, "warning", f"{version} is untested", f"{wanted}; {use}", install)
    return Finding(name, "ok", version, f"--transformer-impl transformer_engine; {use}")


def apex() -> Finding:
    """Apex, which Megatron-Core uses if it is installed."""
    return _optional("Apex", "apex", "used by Megatron-Core", "torch's kernels instead; nothing to do")


def triton() -> Finding:
    """Triton, for the fused kernels on a GPU."""
    use = "fused kernels on a GPU"
    command = "pip install triton" if _gpu_count() else ""
    return _optional("Triton", "triton", use, "plain PyTorch on a GPU; not used on a CPU", command)


def pyarrow() -> Finding:
    """pyarrow, for parquet."""
    return _optional(
        "pyarrow", "pyarrow", "text from parquet", "text from JSON lines only", "pip install pyarrow"
    )


def _optional(name: str, module: str, use: str, otherwise: str, command: str = "") -> Finding:
    """A package that is used if it can be imported; tested only if there is a GPU for it."""
    if importlib.util.find_spec(module) is None:
        return Finding(name, "absent", "not installed", otherwise, command)
    reason = _import_problem(module) if _gpu_count() else None
    if reason is not None:
        return Finding(name, "absent", f"does not import: {reason}", otherwise, command)
    return Finding(name, "ok", version_of(module) or "installed", use)


def _import_problem(module: str) -> str | None:
    """The last line of the error of an import in a separate process, None if it succeeds."""
    done = _run([sys.executable, "-c", f"import {module}"])
    if done is None:
        return "it hangs"
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else None


def extensions() -> Finding:
    """The compiled extensions, and the compiler to build them."""
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    built = [name for name in ("kernels", "encoder") if importlib.util.find_spec(f"megatron_ext._{name}")]
    if len(built) == 2:
        return Finding("extensions", "ok", f"built; compiler {compiler or 'none'}", "fused kernels, encoder")
    use = "the slower Python paths"
    if compiler is None:
        return Finding("extensions", "absent", "no C++ compiler", use, "apt install g++")
    return Finding("extensions", "absent", "not built", use, "bash tools/setup.sh")


def interface() -> Finding:
    """The network interface that gloo would use."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "not known to the resolver"
    found = f"{name} is {address}; one host: {network.LOOPBACK}"
    return Finding("gloo", "ok", found, "many hosts: the way to MASTER_ADDR, or GLOO_SOCKET_IFNAME")


def memory() -> Finding:
    """Cores, memory and free disk space."""
    import psutil

    ram, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    found = f"{os.cpu_count()} cores, {ram.available / 2**30:.0f} of {ram.total / 2**30:.0f} GiB free"
    return Finding("host", "ok", f"{found}, {disk.free / 2**30:.0f} GiB of disk", "checkpoints, caches")


def slurm() -> Finding:
    """SLURM's commands."""
    if shutil.which("sbatch") is None:
        return Finding("SLURM", "absent", "no sbatch", "run torchrun, or the scripts of examples/, by hand")
    version = _output(["sbatch", "--version"]).strip() or "sbatch"
    return Finding("SLURM", "ok", version, "tools/launch_slurm.py")


CHECKS: tuple[Callable[[], Finding], ...] = (
    *(python, torch, megatron_core, gpu, transformer_engine, apex, triton, extensions, pyarrow),
    *(interface, memory, slurm),
)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _run(command: list[str], seconds: float = 120) -> subprocess.CompletedProcess[str] | None:
    """Run a command; None if it does not exist or does not finish in time."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _output(command: list[str]) -> str:
    done = _run(command, 20)
    return done.stdout if done is not None and done.returncode == 0 else ""
