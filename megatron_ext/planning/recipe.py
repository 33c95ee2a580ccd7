"""From a budget of parameters and tokens to a whole training command, with the rule behind each choice.

P1 is PanGu-π Pro (arXiv 2402.02791) with its released scripts; Step Law is arXiv 2503.04715, a fit over 3,700
runs: learning rate 1.79 N^-0.713 D^0.307, batch 0.58 D^0.571 tokens, for N parameters without embedding and
output layer and D tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ext.config.describe import embedding_share
from megatron_ext.config.model import ModelConfig

PAPER, STEP_LAW = "P1, arXiv 2402.02791", "Step Law, arXiv 2503.04715"
#: P1: depth matters most, at about 20 layers and an FFN of 2.77 times the width for 1e9 parameters.
LAYERS, EXPANSION = 21, 2.77
#: P1: larger batches do worse.
LARGEST_BATCH = 4e6


@dataclass(frozen=True)
class Choice:
    """Some flags of the command, and why they have these values."""

    flags: tuple[str, ...]
    rule: str
    source: str


def best_shape(candidates: Iterable[ModelConfig]) -> ModelConfig | None:
    """The candidate closest to the paper's depth, and then to its FFN; None of none."""
    return min(candidates, key=_distance, default=None)


def _distance(model: ModelConfig) -> tuple[float, float]:
    return abs(model.num_layers - LAYERS), abs(model.ffn_hidden_size / model.hidden_size - EXPANSION)


def learning_rate(parameters: float, tokens: float) -> float:
    """Step Law's peak rate for N ``parameters`` without embedding and output layer and D ``tokens``."""
    return 1.79 * parameters**-0.713 * tokens**0.307


def batch_tokens(tokens: float) -> float:
    """Step Law's tokens of a batch for D ``tokens`` in all."""
    return 0.58 * tokens**0.571


def recipe(model: ModelConfig, tokens: float, seq_length: int) -> list[Choice]:
    """How to train ``model`` on ``tokens`` in sequences of ``seq_length``."""
    body = model.num_parameters * (1 - embedding_share(model))
    wanted = batch_tokens(tokens)
    batch = power_of_two(wanted / seq_length, LARGEST_BATCH / seq_length)
    iterations = max(1, round(tokens / (batch * seq_length)))
    # P1: as the batch grows by k, the rate grows by k^0.5.
    rate = learning_rate(body, tokens) * min(1.0, LARGEST_BATCH / wanted) ** 0.5
    shape = (
        f"--num-layers {model.num_layers}",
        f"--hidden-size {model.hidden_size}",
        f"--num-attention-heads {model.num_attention_heads}",
        f"--kv-channels {model.kv_channels}",
        f"--ffn-hidden-size {model.ffn_hidden_size}",
    )
    length = (f"--seq-length {seq_length}", f"--max-position-embeddings {seq_length}")
    regularization = ("--weight-decay 0.1", "--clip-grad 1.0")
    adam = ("--adam-beta1 0.9", "--adam-beta2 0.95", "--adam-eps 1e-8")
    return [
        Choice(shape, f"closest to {LAYERS} layers, then to an FFN of {EXPANSION} x hidden", PAPER),
        Choice(length, "sequence length of the paper, unless --seq-length says another", PAPER),
        Choice(
            (f"--global-batch-size {batch}",),
            f"0.58 D^0.571 = {wanted:,.0f} tokens, at most {LARGEST_BATCH:,.0f}; a power of 2",
            f"{STEP_LAW}; the bound: P1",
        ),
        Choice((f"--train-iters {iterations}",), f"D = {tokens:.3g} tokens", "asked for"),
        Choice(
            (f"--lr {rate:.2e}",),
            f"1.79 N^-0.713 D^0.307, N = {body:.3g}; less by the root of what the bound takes off the batch",
            f"{STEP_LAW}; the root: P1",
        ),
        Choice((f"--min-lr {rate / 10:.2e}", "--lr-decay-style cosine"), "a tenth, by a cosine", PAPER),
        Choice(("--lr-warmup-fraction 0.03",), "3 % of the steps", PAPER),
        Choice(regularization, "as the paper's script", PAPER),
        Choice(adam, "as the paper's script", PAPER),
    ]


def power_of_two(number: float, largest: float) -> int:
    """The one nearest to ``number`` by ratio, from 1 up to ``largest``."""
    power = 1
    while power * 2**0.5 <= number and power * 2 <= largest:
        power *= 2
    return power
