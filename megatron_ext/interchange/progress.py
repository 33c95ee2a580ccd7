"""How far an exchange is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable

from torch import Tensor

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts the bytes of the tensors that a reader gives; writes to stderr."""

    def __init__(self, total_bytes: int, quiet: bool = False):
        self.total, self.quiet = max(total_bytes, 1), quiet
        self.done, self.last_line = 0, time.monotonic()
        self.bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_bytes, unit="B", unit_scale=True, dynamic_ncols=True)

    def watch(self, get: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """``get``, counting what it returns."""

        def watched(key: str) -> Tensor:
            tensor = get(key)
            self._add(key, tensor.numel() * tensor.element_size())
            return tensor

        return watched

    def _add(self, key: str, size: int) -> None:
        self.done += size
        if self.bar is not None:
            self.bar.update(size)
        elif not self.quiet and time.monotonic() - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print(f"{self.done / self.total:.0%} at {key}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
