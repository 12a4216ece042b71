"""Rates, tests and divergences against values known otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from daco_rt.evaluate.metrics import (
    agreement,
    bootstrap,
    fluency,
    kl_nats,
    mcnemar,
    overlap,
    permutation_test,
    token_nats,
    wilson,
)


def test_wilson_solves_its_own_equation():
    # The bounds are the shares p for which (share - p)^2 = z^2 p (1 - p) / n.
    for hits, n in ((3, 10), (0, 7), (50, 50), (17, 400)):
        found = wilson(hits, n)
        z = 1.959963984540054
        for p in (found.low, found.high):
            left, right = (hits / n - p) ** 2, z * z * p * (1 - p) / n
            assert math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12)
        assert 0 <= found.low <= hits / n <= found.high <= 1 and found.n == n
    assert math.isnan(wilson(0, 0).value)
    with pytest.raises(ValueError, match="within 0 and 3"):
        wilson(4, 3)


def test_bootstrap_resamples_prompts_and_covers_the_mean():
    rng = np.random.default_rng(1)
    # Numbers of one prompt are equal: an interval over numbers would be far too narrow.
    values = [np.full(50, x) for x in rng.normal(size=40)]
    found = bootstrap(values)
    assert math.isclose(found.value, float(np.mean([v[0] for v in values])), abs_tol=1e-12)
    half = (found.high - found.low) / 2
    assert 0.7 < half / (1.96 * np.std([v[0] for v in values]) / math.sqrt(40)) < 1.3
    assert bootstrap(values) == found and bootstrap(values, seed=1) != found
    assert bootstrap([[], [2.0]]) == (2.0, 2.0, 2.0, 1)


def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ():
    before = [True] * 9 + [False] * 3 + [True] * 20
    after = [False] * 9 + [True] * 3 + [True] * 20
    assert math.isclose(mcnemar(before, after), 2 * sum(math.comb(12, i) for i in range(4)) / 2**12)
    assert mcnemar([True, False], [True, False]) == 1.0
    with pytest.raises(ValueError, match="pairs must match"):
        mcnemar([True], [])


def test_permutation_test_exact_and_drawn_agree():
    found = np.random.default_rng(0).normal(0.8, 1.0, size=12)
    exact = permutation_test(found, draws=5000)
    drawn = permutation_test(found, draws=4000)
    assert abs(exact - drawn) < 0.02 and 0 < drawn < 0.2
    assert permutation_test(np.zeros(5)) == 1.0


def test_divergence_against_scipy_free_sums():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(4, 30)) * 3, rng.normal(size=(4, 30)) * 3
    p, q = np.exp(a) / np.exp(a).sum(1, keepdims=True), np.exp(b) / np.exp(b).sum(1, keepdims=True)
    assert np.allclose(kl_nats(a, b), (p * np.log(p / q)).sum(1), atol=1e-12)
    assert np.allclose(kl_nats(a, a + 1000.0), 0, atol=1e-9)
    assert (kl_nats(a, b) > 0).all()
    assert np.allclose(token_nats(a, [0, 5, 7, 29]), -np.log(p[np.arange(4), [0, 5, 7, 29]]))
    with pytest.raises(ValueError, match="two arrays"):
        kl_nats(a, b[:2])


def test_overlap_and_fluency():
    assert (
        overlap("A small blade.", "a small BLADE") == 1
        and overlap("one", "two") == 0
        and overlap("", "") == 1
    )
    assert overlap("a b c d", "a b") == pytest.approx(2 * 2 / 6)
    assert fluency("the cat sat on the mat and slept") == 1
    assert fluency("no " * 50) < 0.03 and fluency("") == 0


def test_kappa_of_a_textbook_table():
    # 20 both yes, 5 and 10 apart, 15 both no: agreement 0.7, chance 0.5.
    one = [True] * 25 + [False] * 25
    other = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    equal, kappa = agreement(one, other)
    assert (equal, round(kappa, 6)) == (0.7, 0.4)
    assert math.isnan(agreement([True, True], [True, True])[1]) and math.isnan(agreement([], [])[0])
