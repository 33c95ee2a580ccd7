"""What a model is asked, in token ids: how likely a continuation is after a context.

A text and its continuation are encoded together and cut where the text alone ends, as lm-evaluation-harness
does: a tokenizer may join characters across the cut.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ext.tokenizer import Tokenizer

Ids = tuple[int, ...]
#: Tokens of a forward pass. More would not be faster on a CPU; few of their positions have logits.
TOKENS_AT_ONCE = 4096


class Score(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether each token of it was the likeliest."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Request:
    """Ids that are read, one at least, and ids that are predicted, one at least."""

    context: Ids
    continuation: Ids


class Encoder:
    """Texts to requests.

    Args:
        start: ids in front of every text, where the tokenizer of a Hugging Face folder puts some.
    """

    def __init__(self, tokenizer: Tokenizer, start: Sequence[int] = ()) -> None:
        self.tokenizer, self.start = tokenizer, tuple(start)

    @property
    def prefix(self) -> int:
        """What is read before a text without context: the end of a document, as in pretraining."""
        return self.start[-1] if self.start else self.tokenizer.eod

    def encode(self, text: str) -> Ids:
        """Ids of a text with what the tokenizer puts in front of it."""
        return self.start + tuple(self.tokenizer.tokenize(text))

    def pair(self, context: str, continuation: str) -> Request:
        """A text and what follows it; blanks at its end are the continuation's, as tokenizers have it."""
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        if not text:
            return self.rolling(continuation)
        read, whole = self.encode(text), self.encode(text + continuation)
        # Nothing is left where a tokenizer joined all of it to the text: then it is encoded alone.
        return Request(read, whole[len(read) :] or tuple(self.tokenizer.tokenize(continuation)))

    def rolling(self, text: str) -> Request:
        """All of a text, after the end of another."""
        ids = tuple(self.tokenizer.tokenize(text))
        # A text that begins with the prefix is not given it again.
        return (
            Request(ids[:1], ids[1:])
            if ids[:1] == (self.prefix,) and ids[1:]
            else Request((self.prefix,), ids)
        )


class Window(NamedTuple):
    """What the model reads at once, and the ids that its last positions predict."""

    input: Ids
    targets: Ids


def windows(request: Request, length: int) -> Iterator[Window]:
    """A request in windows of at most ``length`` positions; every id of the continuation is predicted once.

    A window reads as much before its targets as fits, so a context that is too long loses its beginning.
    """
    ids, begin = request.context + request.continuation, len(request.context)
    for first in range(begin, len(ids), length):
        last = min(first + length, len(ids))
        yield Window(ids[max(0, last - 1 - length) : last - 1], ids[first:last])


def is_truncated(request: Request, length: int) -> bool:
    """Whether the context does not fit in front of what is predicted first."""
    return len(request.context) + min(len(request.continuation), length) - 1 > length
