"""Data: from JSON lines to .bin/.idx files, and from these to the microbatches of a rank."""

from typing import Any

__all__ = ["DatasetError", "build_data_loader", "build_datasets"]


def __getattr__(name: str) -> Any:
    # Imported lazily: the tools that write datasets need neither torch nor Megatron-Core.
    if name == "build_data_loader":
        from megatron_ext.data.loader import build_data_loader

        return build_data_loader
    if name == "build_datasets":
        from megatron_ext.data.datasets import build_datasets

        return build_datasets
    if name == "DatasetError":
        from megatron_ext.data.errors import DatasetError

        return DatasetError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
