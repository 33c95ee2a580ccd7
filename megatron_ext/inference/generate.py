"""Autoregressive generation with Megatron-Core's key and value cache."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_ext import platform
from megatron_ext.models.gpt_model import PanguModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    ``temperature`` 0 selects the most likely token. ``top_k`` keeps that many tokens, ``top_p`` the fewest
    tokens with that total probability; 0 and 1 keep all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature must be a number of at least 0, it is {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"--top-k must not be negative, it is {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, it is {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be at least 0 and below 2^63, it is {self.seed}")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Sample a token id from the logits of one position, [v]."""
        if self.temperature == 0:
            return int(logits.argmax())
        # On the CPU in float64, so that all tensor parallel ranks and devices sample the same token.
        probabilities = torch.softmax(logits.double().cpu() / self.temperature, dim=-1)
        ranked, ids = probabilities.sort(descending=True, stable=True)
        kept = ranked.cumsum(0) - ranked < self.top_p
        if self.top_k:
            kept[self.top_k :] = False
        sampled = torch.multinomial(ranked * kept, 1, generator=generator)
        return int(ids[sampled])


@torch.no_grad()
def generate(
    model: PanguModel,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    vocab_size: int,
    stop: int | None = None,
) -> Iterator[int]:
    """Yield the ids that continue ``prompt``, up to ``max_new_tokens`` or the id ``stop``.

    Each step computes one position; the keys and values of earlier positions are cached. The padding of the
    vocabulary beyond ``vocab_size`` is never sampled. Under tensor parallelism every rank calls this
    and yields the same ids.

    Raises:
        ValueError: the prompt is empty, or prompt and continuation exceed the model's positions.
    """
    longest = model.max_sequence_length
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token")
    if len(prompt) + max_new_tokens > longest:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and --max-new-tokens {max_new_tokens} exceed "
            f"the model's {longest} positions (--max-position-embeddings)"
        )
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(prompt) + max_new_tokens)
    ids = prompt
    for _ in range(max_new_tokens):
        token = sampling.choose(_next_logits(model, ids, cache)[:vocab_size], generator)
        yield token
        if token == stop:
            return
        ids = [token]


def _next_logits(model: PanguModel, ids: list[int], cache: StaticInferenceContext) -> Tensor:
    """Logits after ``ids``, [v]; the cache holds the earlier positions, and ``ids`` are added."""
    device = platform.current_device()
    tokens = torch.tensor([ids], device=device)
    position_ids = cache.sequence_len_offset + torch.arange(len(ids), device=device)[None]
    logits = model(tokens, position_ids, None, inference_context=cache, runtime_gather_output=True)
    cache.sequence_len_offset += len(ids)
    return logits.reshape(-1, logits.size(-1))[-1]
