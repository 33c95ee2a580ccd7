"""How far a run is: a bar on a terminal, plain lines elsewhere."""

import sys
import time

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts input bytes, documents and tokens; writes to stderr.

    Args:
        total: input bytes as they lie on disk; None if unknown (a pipe).
        log_interval: in plain lines, documents between two of them at least.
        quiet: say nothing.
    """

    def __init__(self, total: int | None, log_interval: int, quiet: bool = False) -> None:
        self.total, self.log_interval = total or None, log_interval
        self.position = self.text_bytes = self.documents = self.tokens = 0
        self.skipped = 0  # bytes of parts that an earlier run finished
        self.started = self.last_line = time.monotonic()
        self.documents_said = 0
        self.bar, self.quiet = None, quiet
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread: processes are forked later
            self.bar = tqdm(total=self.total, unit="B", unit_scale=True, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def add(self, position: int, text_bytes: int, documents: int, tokens: int, reused: bool = False) -> None:
        """A part is done; ``position`` are its bytes on disk."""
        self.position += position
        if reused:
            self.skipped += position
            if self.bar is not None:
                self.bar.update(position)
            return
        self.text_bytes += text_bytes
        self.documents += documents
        self.tokens += tokens
        if self.bar is not None:
            self.bar.update(position)
            self.bar.set_postfix_str(self.rates())
        elif (
            self.documents - self.documents_said >= self.log_interval
            and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES
        ):
            self.last_line, self.documents_said = time.monotonic(), self.documents
            self.say(f"processed {self.documents:,} documents, {self.rates()}{self._left()}")

    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def rates(self) -> str:
        """Text bytes and tokens a second, of this run."""
        seconds = self.seconds()
        return f"{self.text_bytes / seconds / 1e6:.1f} MB/s, {self.tokens / seconds:,.0f} tokens/s"

    def _left(self) -> str:
        done = self.position - self.skipped
        if not self.total or not done:
            return ""
        left = (self.total - self.position) / done * self.seconds()
        return f", {self.position / self.total:.0%}, {left:,.0f} s left"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
