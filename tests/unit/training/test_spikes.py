"""Spikes are flagged; noise, a falling loss and a new level are not."""

import math
import random

from megatron_ext.training.spikes import MIN_LOSSES, SpikeDetector


def flagged(losses: list[float]) -> list[int]:
    detector = SpikeDetector()
    return [i for i, loss in enumerate(losses) if detector.check(loss)]


def noisy(count: int, level: float = 3.0, seed: int = 0) -> list[float]:
    noise = random.Random(seed)
    return [level + noise.gauss(0, 0.05) for _ in range(count)]


def test_a_spike_is_flagged_and_does_not_hide_the_next():
    losses = noisy(200)
    losses[120], losses[121], losses[150] = 6.0, 5.5, 4.5
    assert flagged(losses) == [120, 121, 150]


def test_noise_and_the_falling_loss_of_a_run_are_not():
    falling = [2 + 8 * math.exp(-i / 60) + value for i, value in enumerate(noisy(1000, 0.0))]
    assert flagged(falling) == []
    assert flagged(noisy(5000)) == []
    assert flagged([3.0] * 100 + [3.01] * 100) == []


def test_a_new_level_is_flagged_for_a_while_only():
    found = flagged(noisy(100) + noisy(100, 5.0))
    assert found == list(range(100, 100 + MIN_LOSSES))


def test_too_early_and_not_finite():
    assert flagged([1.0] * (MIN_LOSSES - 1) + [50.0]) == []
    assert flagged([1.0] * 50 + [math.nan, math.inf]) == []
