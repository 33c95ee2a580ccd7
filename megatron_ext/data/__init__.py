"""Data: from JSON lines to .bin/.idx files, and from these to the microbatches of a rank."""

__all__ = ["DatasetError", "build_data_loader", "build_datasets"]


def __getattr__(name: str):
    # Looked up late: the tools that write datasets need neither torch nor Megatron-Core.
    if name == "build_data_loader":
        from megatron_ext.data.loader import build_data_loader as value
    elif name == "build_datasets":
        from megatron_ext.data.datasets import build_datasets as value
    elif name == "DatasetError":
        from megatron_ext.data.indexed import DatasetError as value
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return value
