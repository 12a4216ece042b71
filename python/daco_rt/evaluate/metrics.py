"""Numbers about answers: rates with intervals, paired tests, divergence, overlap, agreement.

Everything is NumPy; every random draw has a seed. Intervals are 95 % unless told otherwise.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000


class Estimate(NamedTuple):
    """A number with its interval and how many observations it rests on; NaN where there are none."""

    value: float
    low: float
    high: float
    n: int


def wilson(hits: int, count: int, *, level: float = 0.95) -> Estimate:
    """Return a share with Wilson's score interval, which stays sensible at 0, at 1 and for few observations.

    Raises
    ------
    ValueError
        ``hits`` is not within 0 and ``count``.

    Example
    -------
    >>> share = wilson(0, 20)
    >>> share.value, round(share.high, 3)
    (0.0, 0.161)
    """
    if not 0 <= hits <= count:
        raise ValueError(f"wilson: hits must be within 0 and {count}, got {hits}")
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    return _wilson(hits / count, count, level)


def clustered_share(answers: Sequence[Sequence[bool]], *, level: float = 0.95) -> Estimate:
    """Return the share of hits among answers that hang together question by question.

    Wilson's interval at the effective number of answers: repetitions and variants of one question count for
    less than as many questions, the more so the more alike they turn out. With one answer a question this is
    `wilson`. Where all answers are equal, likeness cannot be seen, and each question counts once.

    Parameters
    ----------
    answers : for each question its answers' outcomes. ``n`` of the result counts answers.

    Example
    -------
    >>> one, three = clustered_share([[True], [False]]), clustered_share([[True] * 3, [False] * 3])
    >>> (one.low, one.high) == (three.low, three.high)
    True
    """
    kept = [group for group in answers if len(group)]
    sizes = np.array([len(group) for group in kept], np.float64)
    hits = np.array([sum(group) for group in kept], np.float64)
    n, questions = int(sizes.sum()), len(kept)
    if n == questions:
        return wilson(int(hits.sum()), n, level=level)
    share = float(hits.sum()) / n
    # The variance of a ratio of sums, questions being what is drawn.
    spread = ((hits - share * sizes) ** 2).sum() * questions / max(questions - 1, 1) / n**2
    effective = share * (1 - share) / spread if spread > 0 else questions
    effective = float(min(max(effective, questions), n))
    found = _wilson(share, effective, level)
    return Estimate(share, found.low, found.high, n)


def bootstrap(
    values: Sequence[ArrayLike], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Return the mean over all numbers with a percentile interval that resamples prompts, not numbers.

    Parameters
    ----------
    values : one array a prompt, such as the divergences of its tokens; numbers of one prompt hang together,
        so a prompt is drawn as a whole. The mean weighs every number alike. ``n`` is of prompts.

    Example
    -------
    >>> bootstrap([[1.0, 1.0], [1.0]])
    Estimate(value=1.0, low=1.0, high=1.0, n=2)
    """
    kept = [np.atleast_1d(np.asarray(v, np.float64)) for v in values]
    kept = [v for v in kept if v.size]
    if not kept:
        return Estimate(math.nan, math.nan, math.nan, 0)
    sums, sizes = np.array([v.sum() for v in kept]), np.array([v.size for v in kept])
    drawn = np.random.default_rng(seed).integers(0, len(kept), (draws, len(kept)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(sums.sum() / sizes.sum()), float(low), float(high), len(kept))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Return the two-sided p-value of McNemar's exact test: did a yes-or-no outcome change, pair by pair?

    Only pairs that differ count; under the null hypothesis each is as likely to have changed either way.

    Example
    -------
    >>> mcnemar([True] * 6, [False] * 6)
    0.03125
    """
    if len(before) != len(after):
        raise ValueError(f"mcnemar: pairs must match, got {len(before)} and {len(after)}")
    gained = sum(not b and a for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    n, least = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(least + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_p(differences: Sequence[Sequence[float]]) -> float | None:
    """Return the p-value of paired differences, question by question; None without any.

    One difference of −1, 0 or 1 a question is McNemar's exact test. Otherwise the differences of a question
    are averaged first, for they are not independent, and signs are permuted over questions.

    Example
    -------
    >>> paired_p([[-1.0]] * 6)
    0.03125
    """
    kept = [group for group in differences if len(group)]
    if not kept:
        return None
    flat = [value for group in kept for value in group]
    if len(flat) == len(kept) and all(value in (-1, 0, 1) for value in flat):
        return mcnemar([value < 0 for value in flat], [value > 0 for value in flat])
    return permutation_test([float(np.mean(group)) for group in kept])


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values corrected for being several, by Holm's step-down method, in their order.

    Example
    -------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    found, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        found[i] = least
    return found


def over_seeds(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Return the mean over repetitions with Student's t interval; of fewer than two the interval is NaN.

    Example
    -------
    >>> low, high = over_seeds([0.1, 0.2, 0.3])[1:3]
    >>> round(low, 3), round(high, 3)
    (-0.048, 0.448)
    """
    found = np.asarray(values, np.float64)
    n = len(found)
    mean = float(found.mean()) if n else math.nan
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    half = _t_quantile(0.5 + level / 2, n - 1) * float(found.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def permutation_test(differences: ArrayLike, *, draws: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p-value of a paired permutation test: is the mean difference 0?

    Signs are flipped at random, or in all ways where there are no more than ``draws`` of them. The observed
    arrangement counts as one draw, so p is never 0.

    Example
    -------
    >>> permutation_test([1.0, 1.0, 1.0, 1.0])
    0.125
    """
    found = np.asarray(differences, np.float64).ravel()
    if found.size == 0:
        return 1.0
    observed = abs(found.mean())
    if 2**found.size <= draws:
        ways = (np.arange(2**found.size)[:, None] >> np.arange(found.size)) & 1
        means = (np.where(ways == 1, 1.0, -1.0) @ found) / found.size
        return float((np.abs(means) >= observed - 1e-12).mean())
    rng = np.random.default_rng(seed)
    hits = 1
    for start in range(0, draws, 1000):
        size = min(1000, draws - start)
        signs = rng.integers(0, 2, (size, found.size)) * 2.0 - 1.0
        hits += int((np.abs(signs @ found / found.size) >= observed - 1e-12).sum())
    return hits / (draws + 1)


def kl_nats(plain: ArrayLike, steered: ArrayLike) -> NDArray[np.float64]:
    """Return KL(plain ‖ steered) in nats of each token, from logits [n, V]; float64, never below 0.

    Raises
    ------
    ValueError
        The shapes differ.

    Example
    -------
    >>> kl_nats([[0.0, 0.0]], [[0.0, 0.0]]).tolist()
    [0.0]
    """
    a, b = np.asarray(plain, np.float64), np.asarray(steered, np.float64)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(
            f"kl_nats: logits must be two arrays [n, V], got {list(a.shape)} and {list(b.shape)}"
        )
    p, q = _log_softmax(a), _log_softmax(b)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


def token_nats(logits: ArrayLike, token_ids: Sequence[int]) -> NDArray[np.float64]:
    """Return −ln p of each given token, [n], from logits [n, V]; exp of the mean is the perplexity.

    Example
    -------
    >>> token_nats([[0.0, 0.0]], [1]).round(4).tolist()
    [0.6931]
    """
    found = _log_softmax(np.asarray(logits, np.float64))
    return -found[np.arange(len(token_ids)), np.asarray(token_ids, np.int64)]


def overlap(one: str, other: str) -> float:
    """Return the F1 of two texts' bags of words, in lower case: 1 for equal words, 0 for none in common.

    Two empty texts are equal.

    Example
    -------
    >>> overlap("a small curved blade", "A small blade")
    0.857...
    """
    a, b = Counter(words(one)), Counter(words(other))
    if not a and not b:
        return 1.0
    shared = sum((a & b).values())
    return 2 * shared / (sum(a.values()) + sum(b.values()))


def fluency(text: str) -> float:
    """Return a cheap proxy of fluency, within 0 and 1: the share of distinct word trigrams, 0 for no words.

    It falls when an answer circles ("the the the"), which is how over-steered models mostly break. It does
    not see wrong grammar or nonsense: the divergence and a reading judge do.

    Example
    -------
    >>> fluency("no no no no no no")
    0.25
    """
    found = words(text)
    if not found:
        return 0.0
    if len(found) < 3:
        return 1.0
    grams = [tuple(found[i : i + 3]) for i in range(len(found) - 2)]
    return len(set(grams)) / len(grams)


def words(text: str) -> list[str]:
    """Return a text's words in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower().replace("\u2019", "'"))


def agreement(one: Sequence[Hashable], other: Sequence[Hashable]) -> tuple[float, float]:
    """Return (share of equal verdicts, Cohen's κ) of two judges.

    Pairs in which either is None are left out by the caller. κ is NaN where it is not defined: without pairs,
    or where both judges give one and the same verdict throughout.

    Example
    -------
    >>> agreement([True, True, False, False], [True, False, False, False])
    (0.75, 0.5)
    """
    if len(one) != len(other):
        raise ValueError(f"agreement: verdicts must match, got {len(one)} and {len(other)}")
    n = len(one)
    if n == 0:
        return math.nan, math.nan
    equal = sum(a == b for a, b in zip(one, other, strict=True)) / n
    left, right = Counter(one), Counter(other)
    chance = sum(left[key] * right[key] for key in left) / (n * n)
    return equal, math.nan if chance == 1 else (equal - chance) / (1 - chance)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _wilson(share: float, count: float, level: float) -> Estimate:
    z = _normal_quantile(0.5 + level / 2)
    spread = z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half), int(count))


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def _t_quantile(p: float, freedom: int) -> float:
    """The quantile of Student's t above its median.

    With t = √ν · tan θ the distribution function is an integral of cos^(ν − 1) over θ, which is smooth.
    """
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(p - 0.5, area / area[-1] / 2, angles))
    return math.sqrt(freedom) * math.tan(angle)
