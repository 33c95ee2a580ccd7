"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

SECONDS_BETWEEN_LINES = 5.0

Item = TypeVar("Item")


class Progress:
    """Counts to ``total`` and writes to stderr; a context manager that closes the bar.

    Args:
        what: the start of each line, such as "recording".
        total: None if unknown, such as for a pipe.
        unit: "B" for bytes; otherwise the bar's unit, such as " samples".
        done: the count of an earlier run, which is excluded from the speed.
        quiet: print nothing.
        log_interval: minimum number of documents between two plain lines.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str = "it",
        done: int = 0,
        quiet: bool = False,
        log_interval: int = 0,
    ) -> None:
        self.what, self.total, self.unit, self.quiet = what, total or None, unit, quiet
        self.done = self.before = done
        self.documents = self.tokens = self.text_bytes = 0
        self.log_interval, self.documents_logged = log_interval, 0
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread: processes are forked later
            scale = unit != "it"
            self.bar = tqdm(
                desc=what, total=self.total, initial=done, unit=unit, unit_scale=scale, dynamic_ncols=True
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str) -> None:
        """Print a separate line."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def expect(self, count: int) -> None:
        """There are ``count`` more to do than was known."""
        self.total = (self.total or 0) + count
        if self.bar is not None:
            self.bar.total = self.total

    def add(self, count: int = 1, text: str = "") -> None:
        """Count ``count`` more; ``text`` is shown next to the numbers."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(count)
        elif (
            time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES
            and self.documents - self.documents_logged >= self.log_interval
        ):
            self.last_line, self.documents_logged = time.monotonic(), self.documents
            self.say(", ".join(part for part in (self._amount(), self._speed(), text) if part))

    def add_text(self, count: int, text_bytes: int, documents: int, tokens: int) -> None:
        """Count ``count`` more bytes, which contain this much text."""
        self.text_bytes += text_bytes
        self.documents += documents
        self.tokens += tokens
        seconds = self.seconds()
        rates = f"{self.text_bytes / seconds / 1e6:.1f} MB/s of text, {self.tokens / seconds:,.0f} tokens/s"
        self.add(count, f"{self.documents:,} documents, {rates}")

    def skip(self, count: int) -> None:
        """Count ``count`` more as done by an earlier run."""
        self.before += count
        self.done += count
        if self.bar is not None:
            self.bar.update(count)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Iterate over ``items``, counting each when the next is requested."""
        for item in items:
            yield item
            self.add()

    def seconds(self) -> float:
        """Seconds since the start of this run; never 0."""
        return max(time.monotonic() - self.started, 1e-9)

    def _amount(self) -> str:
        of = f" of {self._count(self.total)} ({self.done / self.total:.0%})" if self.total else ""
        return f"{self.what}: {self._count(self.done)}{of}"

    def _speed(self) -> str:
        speed = (self.done - self.before) / self.seconds()
        left = f", {(self.total - self.done) / speed:,.0f} s left" if self.total and speed else ""
        return f"{self._count(speed)}/s{left}"

    def _count(self, number: float) -> str:
        if self.unit == "B":
            return f"{number / 1e6:,.1f} MB"
        return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"
