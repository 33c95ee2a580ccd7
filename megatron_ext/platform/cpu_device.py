"""``torch.cuda`` as Megatron-Core sees it on a CPU: the same functions, implemented for the CPU.

A CPU has one queue of work and one random generator, so streams and events are empty and the
"CUDA generator" is torch's default generator. Other names are those of the real ``torch.cuda``
(which reports that no device is available).
"""

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch


class Stream:
    """A queue of work; on a CPU there is only one, which is always finished."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def synchronize(self) -> None:
        pass


class Event:
    """A point in a queue of work; on a CPU it is always reached."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _OneGenerator:
    """``torch.cuda.default_generators``: the CPU's generator for every index."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _nothing(*args: object, **kwargs: object) -> None:
    pass


def _context(*args: object, **kwargs: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _get_rng_state(device: object = "cpu") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = "cpu") -> None:
    torch.set_rng_state(state)


class CpuAsCuda(types.ModuleType):
    """The replacement of ``torch.cuda``; attributes not set here are those of the real module."""

    def __init__(self) -> None:
        super().__init__("torch.cuda", "torch.cuda for a CPU")
        rng = types.ModuleType("torch.cuda.random")
        for place in (self, rng):
            vars(place).update(get_rng_state=_get_rng_state, set_rng_state=_set_rng_state)
            vars(place).update(manual_seed=torch.manual_seed, manual_seed_all=torch.manual_seed)
        self.random = rng
        self.default_generators = _OneGenerator()
        self._lazy_init = _nothing
        self._lazy_call = lambda call, **kwargs: call()

        self.current_device = lambda: torch.device("cpu")
        self.device_count = lambda: 1
        self.set_device = self.synchronize = self.empty_cache = _nothing
        self.device = self.stream = _context
        self.Stream, self.Event = Stream, Event
        self.current_stream = self.default_stream = lambda device=None: Stream()
        self.nvtx = types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=_context)

        self.FloatTensor = torch.FloatTensor
        self.HalfTensor = torch.HalfTensor
        self.BFloat16Tensor = torch.BFloat16Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _uncompiled(model: Callable[..., Any] | None = None, **kwargs: object) -> Callable[..., Any]:
    """``torch.compile`` that returns the function unchanged, as no compiler may be installed."""
    return model if model is not None else _uncompiled


class TorchView(types.ModuleType):
    """``torch`` as the modules of Megatron-Core see it: torch, with ``cuda`` replaced for a CPU.

    The rest of the process keeps the real torch. The attributes are copied once, so that attribute
    access is as fast as in torch itself.
    """

    def __init__(self) -> None:
        super().__init__("torch", torch.__doc__)
        self.__dict__.update(vars(torch))
        self.cuda = CpuAsCuda()
        self.compile = _uncompiled

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
