"""Choosing the next token from logits: pure functions on one row of numpy floats.

The order is the usual one: repetition penalty, temperature, top-k, min-p, top-p, draw. Filters set
what they drop to ``-inf`` and always keep the most likely token. Temperature 0 means greedy (the
filters then cannot matter). Each request owns its generator, so what it draws does not depend on the
other requests of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daco_rt.errors import DacoError

Floats = NDArray[np.floating[Any]]

_FEW = 1024


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy.

    Example
    -------
    >>> Sampling(temperature=0.7, top_p=0.9).greedy
    False
    """

    temperature: float = 0.0
    """Logits are divided by this; 0 means greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities reach this sum; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens seen so far (prompt included) are divided by this, negative ones
    multiplied; 1 changes nothing."""

    def __post_init__(self) -> None:
        _require(
            self.temperature >= 0 and np.isfinite(self.temperature), "temperature", ">= 0", self.temperature
        )
        _require(self.top_k >= 0, "top_k", ">= 0", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        _require(
            self.repetition_penalty > 0 and np.isfinite(self.repetition_penalty),
            "repetition_penalty",
            "> 0",
            self.repetition_penalty,
        )

    @property
    def needs_history(self) -> bool:
        """True if the choice depends on the tokens seen so far."""
        return self.repetition_penalty != 1

    @property
    def greedy(self) -> bool:
        """True if the most likely token is taken."""
        return self.temperature == 0


def _require(holds: bool, name: str, wanted: str, got: float) -> None:
    if not holds:
        raise DacoError(f"sampling: {name} must be {wanted}, got {got}")


def penalise_repetition(logits: Floats, seen: Sequence[int] | NDArray[np.integer], penalty: float) -> Floats:
    """Return ``logits`` [V] with the tokens in ``seen`` made less likely (more, for a penalty below 1)."""
    ids = np.unique(np.asarray(seen, dtype=np.int64))
    out = logits.copy()
    if ids.size:
        out[ids] = np.where(out[ids] > 0, out[ids] / penalty, out[ids] * penalty)
    return out


def keep_top_k(logits: Floats, k: int) -> Floats:
    """Return ``logits`` [V] with all but the ``k`` largest set to -inf; ties with the k-th are kept."""
    if k <= 0 or k >= logits.size:
        return logits
    threshold = np.partition(logits, -k)[-k]
    return np.where(logits >= threshold, logits, -np.inf)


def keep_top_p(logits: Floats, p: float) -> Floats:
    """Return ``logits`` [V] with all but the smallest most-likely set of total probability >= p at -inf."""
    if p >= 1:
        return logits
    probabilities = softmax(logits)
    # The set is nearly always small, and sorting a whole vocabulary costs more than the rest together.
    few = min(_FEW, logits.size)
    candidates = np.argpartition(-logits, few - 1)[:few]
    if probabilities[candidates].sum() < p:
        candidates = np.arange(logits.size)
    candidates = candidates[np.lexsort((candidates, -logits[candidates]))]
    mass = probabilities[candidates]
    kept = candidates[np.cumsum(mass) - mass < p]
    out = np.full_like(logits, -np.inf)
    out[kept] = logits[kept]
    return out


def keep_min_p(logits: Floats, p: float) -> Floats:
    """Return ``logits`` [V] with tokens less likely than ``p`` times the most likely one at -inf."""
    if p <= 0:
        return logits
    return np.where(logits >= logits.max() + np.log(p), logits, -np.inf)


def softmax(logits: Floats) -> Floats:
    """Return the probabilities of ``logits`` [V]; entries at -inf get 0."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def choose(
    logits: Floats,
    sampling: Sampling,
    rng: np.random.Generator,
    seen: Sequence[int] | NDArray[np.integer] = (),
) -> int:
    """Return the next token id.

    Parameters
    ----------
    logits : float array, shape [V]
    sampling : Sampling
    rng : numpy Generator of the request; greedy choice draws nothing from it
    seen : ids of the prompt and of what was generated, for the repetition penalty

    Raises
    ------
    DacoError
        A logit is NaN, or none is finite (the model or a policy produced no usable row).

    Example
    -------
    >>> choose(np.array([0.0, 2.0, 1.0]), Sampling(), np.random.default_rng(0))
    1
    """
    if not np.isfinite(logits.max()):
        raise DacoError(
            "the model returned logits that are not finite for this row; check the checkpoint and the policy "
            "with `daco-rt verify`"
        )
    if sampling.greedy and not sampling.needs_history:
        return int(logits.argmax())
    row: Floats = np.asarray(logits, dtype=np.float64)
    if sampling.needs_history:
        row = penalise_repetition(row, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return int(row.argmax())
    row = keep_top_k(row / sampling.temperature, sampling.top_k)
    row = keep_top_p(keep_min_p(row, sampling.min_p), sampling.top_p)
    cumulative = np.cumsum(softmax(row))
    # The draw is scaled by the last sum, so rounding cannot push it past the end.
    drawn = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return min(drawn, int(np.flatnonzero(row > -np.inf)[-1]))
