"""Environment variables that CUDA's libraries read at their first use, and the values that a run needs."""

import os
from collections.abc import Mapping

#: For deterministic runs; if a variable is unset, the first value is used.
#: cuBLAS: docs.nvidia.com/cuda/cublas, "Results Reproducibility"; NCCL_ALGO: as required by Megatron-LM.
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


def settings(model_parallel: bool, deterministic: bool) -> dict[str, str]:
    """The environment variables of a run on GPUs.

    ``model_parallel``: with tensor or context parallelism, communication must start before the kernels that
    were launched after it, so the GPU gets only one queue (Megatron-LM's validate_args).
    """
    wanted = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if model_parallel else {}
    return wanted | ({name: values[0] for name, values in DETERMINISTIC.items()} if deterministic else {})


def apply(wanted: Mapping[str, str]) -> None:
    """Set the variables that are not set yet."""
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def not_deterministic() -> list[str]:
    """The variables that prevent a deterministic run, a sentence each."""
    return [
        f"{name}={os.environ[name]} is in the environment: unset it, or set it to {' or '.join(values)}"
        for name, values in DETERMINISTIC.items()
        if os.environ.get(name, values[0]) not in values
    ]
