"""Intervals at their ends, and against an independent implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from evaluation.evaluators.base import Z_95, bootstrap_mean, wilson
from evaluation.evaluators.nudity import relative_change


def test_wilson_at_the_ends():
    none, every = wilson(0, 20), wilson(20, 20)
    assert none.value == none.low == 0.0
    assert none.high == pytest.approx(Z_95**2 / (20 + Z_95**2))
    assert every.value == every.high == 1.0
    assert every.low == pytest.approx(1 - none.high)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (5, 10), (37, 500), (480, 500), (99, 100)])
def test_wilson_agrees_with_scipy(k, n):
    reference = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    interval = wilson(k, n)
    assert interval.value == k / n
    assert interval.low == pytest.approx(reference.low, abs=1e-12)
    assert interval.high == pytest.approx(reference.high, abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(k, n):
    with pytest.raises(ValueError, match="wilson"):
        wilson(k, n)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    interval = bootstrap_mean(values.tolist(), seed=0)
    half = Z_95 * values.std(ddof=1) / math.sqrt(1000)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_is_a_function_of_values_and_seed():
    values = np.random.default_rng(0).normal(size=30).tolist()
    state = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]


def test_bootstrap_of_equal_values_has_no_width():
    assert bootstrap_mean([2.5] * 4, seed=0) == (2.5, 2.5, 2.5)
    assert bootstrap_mean([7.0], seed=0) == (7.0, 7.0, 7.0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses_nothing_and_nan(values):
    with pytest.raises(ValueError, match="bootstrap_mean"):
        bootstrap_mean(values, seed=0)


def test_relative_change_of_counts() -> None:
    assert relative_change([1, 2, 3], [1, 2, 3]) == (0, 0, 0)
    assert relative_change([0, 0], [1, 2]) is None
