"""Log-likelihoods of continuations, from a model at any tensor, pipeline and data parallel layout.

Windows are sorted by length and cut into passes: each pass runs some windows of about the same length through
the pipeline, shared among the data parallel ranks. Windows that read the same ids are read once (the letters
of a question are). Only the positions that predict something reach the output layer.

The passes follow from the requests and the layout alone: what is scored again, or from where it was
interrupted, has the same numbers to the last bit.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.evaluation.requests import (
    TOKENS_AT_ONCE,
    Ids,
    Request,
    Score,
    Window,
    windows,
)
from megatron_ext.kernels.cross_entropy import cross_entropy_stats, width_of_shard
from megatron_ext.models.builder import unwrap
from megatron_ext.platform.collective import on_first_rank, ranks

#: Lengths are rounded up to it: tensor parallel ranks share the positions, and FP8 wants whole tiles.
_LENGTH_UNIT = 16


class Memory(Protocol):
    """Keeps the scores of passes."""

    def recall(self, keys: Sequence[str]) -> dict[str, list[Score]]:
        """Those of ``keys`` that are there."""
        ...

    def keep(self, key: str, scores: list[Score]) -> None:
        """Remember a pass."""
        ...


@dataclass
class _Row:
    """Ids that are read once, and every window that reads them, as (its number, its targets)."""

    input: Ids
    windows: list[tuple[int, Ids]] = field(default_factory=list)


@dataclass(frozen=True)
class _Pass:
    """Rows in microbatches of one shape: row i goes to share i % shares."""

    rows: list[_Row]
    length: int  # of each row, with padding
    shares: int

    @property
    def numbers(self) -> list[int]:
        """The windows of the pass, in the order of its scores."""
        return [number for row in self.rows for number, _ in row.windows]

    def key(self, seed: str) -> str:
        """A name of all that decides its scores."""
        content = [(row.input, [targets for _, targets in row.windows]) for row in self.rows]
        return hashlib.sha256(repr((seed, self.length, self.shares, content)).encode()).hexdigest()


class Scorer:
    """Scores requests with a model; every call is collective.

    Args:
        model: the chunks of this rank, in evaluation mode.
        longest: positions that the model may read at once.
        memory: of rank 0, for passes that were scored before. ``identity`` says which model it is.
        note: called after each pass with the number of its windows, as a sign of progress.
    """

    def __init__(
        self,
        model: Sequence[nn.Module],
        longest: int,
        *,
        tokens_at_once: int = TOKENS_AT_ONCE,
        memory: Memory | None = None,
        identity: str = "",
        note: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.model, self.longest, self.tokens_at_once = list(model), longest, tokens_at_once
        self.memory, self.identity, self.note = memory, identity, note

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """The scores of requests, in their order, on every rank."""
        owners, cut = _windows(requests, self.longest)
        scores: list[Score] = [Score(0.0, True)] * len(requests)
        for passed, found in self._passes(cut):
            for number, score in zip(passed.numbers, found, strict=True):
                sofar = scores[owners[number]]
                scores[owners[number]] = Score(sofar.logprob + score.logprob, sofar.greedy and score.greedy)
            self.note(len(found))
        return scores

    def _passes(self, cut: Sequence[Window]) -> Iterator[tuple[_Pass, list[Score]]]:
        passes = list(_plan(cut, self.tokens_at_once, self.longest))
        known = on_first_rank(lambda: self._recalled(passes))
        for number, one in enumerate(passes):
            scores = known.get(number)
            if scores is None:
                scores = _run(one, self.model)
                if self.memory is not None:
                    self.memory.keep(one.key(self._seed), scores)
            yield one, scores

    @property
    def _seed(self) -> str:
        return f"{self.identity} {ranks()} {parallel_state.get_tensor_model_parallel_world_size()}"

    def _recalled(self, passes: Sequence[_Pass]) -> dict[int, list[Score]]:
        """The passes that the memory has, by number."""
        if self.memory is None:
            return {}
        keys = [one.key(self._seed) for one in passes]
        known = self.memory.recall(keys)
        return {number: known[key] for number, key in enumerate(keys) if key in known}


def _windows(requests: Sequence[Request], longest: int) -> tuple[list[int], list[Window]]:
    """The request of each window, and the windows."""
    pairs = [(number, window) for number, one in enumerate(requests) for window in windows(one, longest)]
    return [number for number, _ in pairs], [window for _, window in pairs]


def _plan(cut: Sequence[Window], tokens_at_once: int, longest: int) -> Iterator[_Pass]:
    """Rows from the longest to the shortest, as many at once as make ``tokens_at_once`` on each rank."""
    rows: dict[Ids, _Row] = {}
    for number, window in enumerate(cut):
        rows.setdefault(window.input, _Row(window.input)).windows.append((number, window.targets))
    left = iter(sorted(rows.values(), key=lambda row: (-len(row.input), row.input)))
    shares = (
        parallel_state.get_data_parallel_world_size()
        * parallel_state.get_pipeline_model_parallel_world_size()
    )
    while first := next(left, None):
        rounded = -(-len(first.input) // _LENGTH_UNIT) * _LENGTH_UNIT
        length = max(len(first.input), min(rounded, longest))
        each = max(1, tokens_at_once // length)
        yield _Pass([first, *islice(left, each * shares - 1)], length, shares)


def _run(one: _Pass, model: list[nn.Module]) -> list[Score]:
    """The scores of a pass on every rank; a collective call."""
    stages, data_rank = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    # Shares that have no row read the first one, so that every rank does the same.
    shares = [one.rows[share :: one.shares] or one.rows[:1] for share in range(one.shares)]
    mine = shares[data_rank * stages : (data_rank + 1) * stages]
    size = max(map(len, shares))
    found = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, length=one.length, size=size),
        data_iterator=[iter(mine) for _ in model] if len(model) > 1 else iter(mine),
        model=model if len(model) > 1 else model[0],
        num_microbatches=stages,
        seq_length=one.length,
        micro_batch_size=size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return _collected(
        one, dict(zip(range(data_rank * stages, (data_rank + 1) * stages), found, strict=False))
    )


def _forward_step(rows: Iterator[list[_Row]], chunk: nn.Module, length: int, size: int) -> tuple[Tensor, Any]:
    """One microbatch through a chunk, as Megatron-Core's schedules call it."""
    batch = next(rows)
    device = platform.current_device()
    tokens = torch.zeros(size, length, dtype=torch.int64)
    for i, row in enumerate(batch):
        tokens[i, : len(row.input)] = torch.tensor(row.input)
    positions = torch.arange(length, device=device).expand(size, -1)
    # Hidden states are [s, b, h]: position p of row i is number p * b + i.
    at = [
        (len(row.input) - len(targets) + offset) * size + i
        for i, row in enumerate(batch)
        for _, targets in row.windows
        for offset in range(len(targets))
    ]
    predicted = [target for row in batch for _, targets in row.windows for target in targets]
    counts = [len(targets) for row in batch for _, targets in row.windows]
    bare = unwrap(chunk)
    with _only(bare, torch.tensor(at, device=device)):
        output = chunk(tokens.to(device), positions, None)

    def scores(logits: Tensor, non_loss_data: bool = True) -> Tensor:
        targets = torch.tensor(predicted, device=device)
        return _sums(*_of_tokens(logits[0], targets, bare), torch.tensor(counts, device=device))

    return output, scores


@contextmanager
def _only(model: Any, at: Tensor) -> Iterator[None]:
    """Within it only the hidden states ``at`` ([n], numbered over [s, b]) reach the output layer."""
    if not model.post_process:
        yield
        return
    layer = model.output_layer
    split, layer.sequence_parallel = layer.sequence_parallel, False

    def select(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = gather_from_sequence_parallel_region(inputs[0]) if split else inputs[0]  # [s, b, h]
        return hidden.flatten(0, 1)[at][:, None], *inputs[1:]  # [n, 1, h]

    hook = layer.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
        layer.sequence_parallel = split


def _of_tokens(logits: Tensor, targets: Tensor, model: Any) -> tuple[Tensor, Tensor]:
    """Logits [n, v / tp] and targets [n] -> log-probabilities in fp64, and whether each is the likeliest."""
    group = model.pg_collection.tp
    first = torch.distributed.get_rank(group) * logits.size(-1)
    width = width_of_shard(logits.size(-1), first, model.softmax_vocab_size)
    top, total, logit = (
        part.double() for part in cross_entropy_stats(logits.contiguous(), targets, first, width)
    )
    if torch.distributed.get_world_size(group) > 1:
        own = top.clone()
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=group)
        total *= (own - top).exp()
        torch.distributed.all_reduce(total, group=group)
        torch.distributed.all_reduce(logit, group=group)
    return logit - top - total.log(), logit == top


def _sums(logprobs: Tensor, likeliest: Tensor, counts: Tensor) -> Tensor:
    """Of tokens [n] -> of windows [w, 2]: summed log-probability, how many were not the likeliest."""
    of_window = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    sums = torch.zeros(len(counts), 2, dtype=torch.float64, device=counts.device)
    return sums.index_add_(0, of_window, torch.stack([logprobs, (~likeliest).double()], 1))


def _collected(one: _Pass, found: dict[int, Tensor]) -> list[Score]:
    """The scores that the ranks have, each of some shares, brought together on all; a collective call."""
    starts, total = [], 0
    for row in one.rows:
        starts.append(total)
        total += len(row.windows)
    sums = torch.zeros(total, 2, dtype=torch.float64, device=platform.current_device())
    if parallel_state.get_tensor_model_parallel_rank() == 0:  # the others have the same
        for share, values in found.items():
            places = [
                starts[i] + j
                for i in range(share, len(one.rows), one.shares)
                for j in range(len(one.rows[i].windows))
            ]
            sums[places] = values[: len(places)]
    if ranks() > 1:
        torch.distributed.all_reduce(sums)
    return [Score(logprob, wrong == 0) for logprob, wrong in sums.tolist()]
