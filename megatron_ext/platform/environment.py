"""Variables that CUDA's libraries read from the environment at their first use, and what they should be."""

import os
from collections.abc import Mapping

#: For a run that gives the same numbers each time, the first value of each is set where there is none.
#: cuBLAS: docs.nvidia.com/cuda/cublas, "Results Reproducibility"; NCCL_ALGO: as Megatron-LM asks for.
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


def settings(model_parallel: bool, deterministic: bool) -> dict[str, str]:
    """What a run on GPUs wants in its environment.

    ``model_parallel``: with tensor or context parallelism a kernel's communication has to start before
    the kernels that were launched after it: the GPU gets one queue (Megatron-LM's validate_args).
    """
    wanted = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if model_parallel else {}
    return wanted | ({name: values[0] for name, values in DETERMINISTIC.items()} if deterministic else {})


def apply(wanted: Mapping[str, str]) -> None:
    """Set what the environment does not say."""
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def not_deterministic() -> list[str]:
    """What the environment says against a deterministic run, a sentence each."""
    return [
        f"{name}={os.environ[name]} is in the environment: unset it, or set it to {' or '.join(values)}"
        for name, values in DETERMINISTIC.items()
        if os.environ.get(name, values[0]) not in values
    ]
