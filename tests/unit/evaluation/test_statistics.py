"""Errors and verdicts, against formulas and against chance."""

import numpy as np
import pytest

from megatron_ext.evaluation.statistics import bootstrap_error, holm, paired_difference, signal_to_noise


def test_error_of_a_mean_is_that_of_the_formula():
    values = np.random.default_rng(1).exponential(size=400)
    formula = values.std(ddof=1) / 20
    assert bootstrap_error(values.tolist()) == pytest.approx(formula, rel=0.05)
    assert bootstrap_error([0.25] * 9) == 0


def test_pairs_see_what_means_hide():
    """Items differ far more among themselves than the models do."""
    draw = np.random.default_rng(2)
    a = 10 * draw.standard_normal(300)
    b = a + 0.1 + 0.3 * draw.standard_normal(300)
    found = paired_difference(a.tolist(), b.tolist())
    assert found.items == 300 and found.low < found.mean < found.high
    assert found.low > 0 and found.p < 0.01
    assert bootstrap_error(b.tolist()) > 5 * (found.high - found.low)
    assert paired_difference(a.tolist(), a.tolist()).p == 1


def test_chance_is_called_chance():
    """Of equal models about one in twenty differs at 5 %."""
    draw = np.random.default_rng(3)
    wrong = 0
    for _ in range(100):
        a, b = (draw.integers(0, 2, 150).tolist() for _ in range(2))
        wrong += paired_difference(a, b).p < 0.05
    assert wrong <= 11


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == [True, False, False]
    assert holm([0.01, 0.02, 0.03]) == [True, True, True]
    assert holm([]) == []


def test_signal_to_noise():
    assert signal_to_noise([3.0, 2.0, 1.0], 0.5) == pytest.approx(2 / (2**0.5 * 0.5))
