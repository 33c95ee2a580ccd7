"""Profiles of a GPU: the window that nsys captures, and the history of allocations."""


class NsysWindow:
    """The part of a run that nsys captures (``--capture-range cudaProfilerApi``)."""

    def start(self) -> None:
        import torch

        torch.cuda.cudart().cudaProfilerStart()

    def stop(self) -> None:
        import torch

        torch.cuda.cudart().cudaProfilerStop()


def record_memory_history() -> None:
    """Record every allocation of GPU memory from now on."""
    import torch

    torch.cuda.memory._record_memory_history(True)


def dump_memory_history(path: str) -> None:
    """Write the allocation history for pytorch.org/memory_viz."""
    import torch

    torch.cuda.memory._dump_snapshot(path)
