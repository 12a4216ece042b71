"""Sampling against plain references, by exact sets and by frequencies."""

from __future__ import annotations

import numpy as np
import pytest

from daco_rt.errors import DacoError
from daco_rt.runtime.sampling import (
    Sampling,
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    softmax,
)


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(3).normal(size=50) * 2


def _kept(row: np.ndarray) -> set[int]:
    return set(np.flatnonzero(row > -np.inf).tolist())


@pytest.mark.parametrize("k", [1, 7, 50, 80])
def test_top_k_keeps_the_k_largest(logits: np.ndarray, k: int) -> None:
    assert _kept(keep_top_k(logits, k)) == set(sorted(range(50), key=lambda i: -logits[i])[:k])


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_is_the_smallest_set_that_reaches_p(logits: np.ndarray, p: float) -> None:
    probabilities = np.exp(logits) / np.exp(logits).sum()
    order, total, expected = sorted(range(50), key=lambda i: -probabilities[i]), 0.0, set()
    for i in order:
        if total >= p:
            break
        expected.add(i)
        total += probabilities[i]
    assert _kept(keep_top_p(logits, p)) == expected


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p_is_relative_to_the_most_likely(logits: np.ndarray, p: float) -> None:
    probabilities = np.exp(logits) / np.exp(logits).sum()
    expected = {i for i in range(50) if probabilities[i] >= p * probabilities.max() * (1 - 1e-12)}
    assert _kept(keep_min_p(logits, p)) == expected


def test_repetition_penalty_lowers_both_signs() -> None:
    got = penalise_repetition(np.array([2.0, -2.0, 1.0]), [0, 1, 1], 2.0)
    assert got.tolist() == [1.0, -4.0, 1.0]


def test_greedy_takes_the_first_of_equals_and_draws_nothing() -> None:
    rng = np.random.default_rng(0)
    assert choose(np.array([0.0, 3.0, 3.0]), Sampling(), rng) == 1
    assert rng.random() == np.random.default_rng(0).random()


def test_draws_follow_the_filtered_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    sampling = Sampling(temperature=2.0, top_k=3)
    expected = softmax(logits[:3] / 2.0)
    rng = np.random.default_rng(1)
    counts = np.bincount([choose(logits, sampling, rng) for _ in range(20000)], minlength=4) / 20000
    assert counts[3] == 0
    # Four standard errors of a frequency near 0.5 over 20000 draws.
    assert np.abs(counts[:3] - expected).max() < 0.015


def test_a_seed_repeats_its_draws(logits: np.ndarray) -> None:
    draw = lambda seed: [  # noqa: E731
        choose(logits, Sampling(temperature=1.0), rng)
        for rng in [np.random.default_rng(seed)]
        for _ in range(20)
    ]
    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_a_draw_at_the_very_end_stays_among_the_kept() -> None:
    class Last:
        def random(self) -> float:
            return 1.0

    got = choose(np.array([1.0, 1.0, -50.0]), Sampling(temperature=1.0, top_k=2), Last())  # type: ignore[arg-type]
    assert got in (0, 1)


def test_unusable_logits_and_settings_are_refused() -> None:
    with pytest.raises(DacoError, match="not finite"):
        choose(np.array([0.0, np.nan]), Sampling(), np.random.default_rng(0))
    with pytest.raises(DacoError, match="not finite"):
        choose(np.full(3, -np.inf), Sampling(), np.random.default_rng(0))
    for bad in ({"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"top_k": -1}, {"repetition_penalty": 0}):
        with pytest.raises(DacoError, match=next(iter(bad))):
            Sampling(**bad)
