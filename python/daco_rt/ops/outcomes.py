"""Every result that a correct implementation may give for a row.

Steering has cliffs: a top-k cut, a pursuit arg-max, a threshold, a deadband. Rounding may put a row that
stands next to one on either side. For such a row the reference is evaluated on both sides; where that
makes no difference to z' (a weak neutral concept swapped for another, say) the cliff is of no consequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from daco_rt.ops import reference
from daco_rt.ops.quantise import dequantise
from daco_rt.ops.reference import Array, Decisions

CLOSE = 1e-4
"""A row is next to a cliff if what is compared there differs by no more than this, relatively."""
SAME = 1e-7
"""Results closer than this to each other, relative to ‖z‖, are one."""


class Outcomes:
    """The possible results of one block's operator, in float64.

    Parameters
    ----------
    operands : mapping
        By the operator contract's names (``enc`` … or ``analysis`` …), as ``Pack.operands`` gives them.
    coder, k, sign, tol, tau, alpha : the operator's attributes.

    Example
    -------
    >>> import numpy as np
    >>> tables = dict(gain=np.array([[1.0], [1.0], [0.0]]), undesirable=np.zeros((3, 1), bool),
    ...               shift=np.zeros((3, 2)), limits=np.zeros((3, 4)))
    >>> atom = np.array([[1.0, 0]])
    >>> one = Outcomes(dict(enc=atom, enc_bias=np.zeros(1), dec=atom, **tables), coder="topk", k=1)
    >>> one(np.array([3.0, 4.0]), 2)
    [array([0., 4.])]
    """

    def __init__(
        self,
        operands: Mapping[str, NDArray],
        *,
        coder: str,
        k: int,
        sign: str = "positive",
        tol: float = 0.0,
        tau: float = 0.95,
        alpha: float = 0.05,
    ) -> None:
        self.coder, self.k, self.sign, self.tol = coder, k, sign, tol
        self.tau, self.alpha = tau, alpha
        wide = {
            name: np.asarray(a).astype(np.float64)
            for name, a in dequantise(operands).items()
            if name not in ("undesirable", "gram")
        }
        self.atoms = wide["dec" if "dec" in wide else "atoms"]
        self.gain, self.shift, self.limits = wide["gain"], wide["shift"], wide["limits"]
        self.boost = reference.or_zeros(operands.get("boost"), self.gain)
        self.atom_norm = np.linalg.norm(self.atoms, axis=1)
        if coder in ("omp", "elastic_net"):
            self.analysis, self.bias = wide["analysis"], wide["bias"]
            self.gram = reference.GramColumns(self.analysis, self.atoms)
        else:
            self.analysis, self.bias = wide["enc"], wide["enc_bias"]
            self.level = reference.or_zeros(None if coder == "relu" else wide.get("threshold"), self.bias)
            undesirable = np.asarray(operands["undesirable"], bool)
            self.watched = reference.watched_latents(self.gain, self.boost, undesirable)

    def __call__(self, row: NDArray, slot: int) -> list[Array]:
        """Return the results [d] for one row, the reference's own first, the others different from it.

        ``slot`` is taken as the operator takes it: rows under slots below 2 and rows that are not finite
        come back as they are.
        """
        z = np.asarray(row, np.float64)
        if slot < 2 or not np.isfinite(z).all():
            return [z]
        results: list[Array] = []
        for code in self._codes(z):
            for limits in self._limits(code, self.limits[slot]):
                out = reference.edit_row(
                    z, code, self.atoms, self.gain[slot], self.boost[slot], self.shift[slot], limits
                )
                tolerance = SAME * np.linalg.norm(z)
                if all(np.linalg.norm(out - known) > tolerance for known in results):
                    results.append(out)
        return results

    def clear(self, row: NDArray, slot: int) -> bool:
        """Whether a row [d] is next to no cliff at all, so that support and doses are determined too."""
        z = np.asarray(row, np.float64)
        if slot < 1 or not np.isfinite(z).all():
            return True
        ways = 0
        for code in self._codes(z):
            ways += sum(1 for _ in self._limits(code, self.limits[slot])) if slot >= 2 else 1
            if ways > 1:
                return False
        return True

    def _limits(self, code: Array, limits: Array) -> Iterator[Array]:
        """The limits and, if an active code stands next to the deadband, both sides of it."""
        yield limits
        strength = np.abs(code) * self.atom_norm
        if limits[0] > 0 and (np.abs(strength / limits[0] - 1) <= CLOSE).any():
            for scale in (1 - 2 * CLOSE, 1 + 2 * CLOSE):
                yield limits * np.array([scale, 1, 1, 1])

    def _codes(self, z: Array) -> Iterator[Array]:
        if self.coder == "omp":
            yield from self._pursuits(z)
        elif self.coder == "elastic_net":
            # Continuous in z: there is no other side.
            yield reference.elastic_net(
                z, self.analysis, self.bias, self.gram.__getitem__, self.gram.diagonal, self.atom_norm,
                tau=self.tau, alpha=self.alpha, signed=self.sign == "signed",
            )  # fmt: skip
        elif self.coder == "none":
            yield np.zeros(len(self.atoms))
        elif self.coder == "topk":
            yield from self._cuts(np.maximum(self.analysis @ z + self.bias, 0))
        else:
            yield from self._thresholds(self.analysis @ z + self.bias)

    def _pursuits(self, z: Array) -> Iterator[Array]:
        def pursue(decisions: Decisions) -> Array:
            return reference.orthogonal_matching_pursuit(
                z,
                self.analysis,
                self.bias,
                self.gram,
                self.atoms,
                k=self.k,
                sign=self.sign,
                tol=self.tol,
                decisions=decisions,
            )

        straight = Decisions()
        yield pursue(straight)
        for number, margin in enumerate(straight.margins):
            if margin <= CLOSE:
                yield pursue(Decisions(flip=number))

    def _cuts(self, a: Array) -> Iterator[Array]:
        yield reference.keep_largest(a, self.k)
        if self.k < len(a):
            order = np.argsort(-a, kind="stable")
            kept, dropped = order[self.k - 1], order[self.k]
            if a[dropped] > 0 and a[kept] - a[dropped] <= CLOSE * a[kept]:
                swapped = reference.keep_largest(a, self.k)
                swapped[kept], swapped[dropped] = 0.0, a[dropped]
                yield swapped

    def _thresholds(self, a: Array) -> Iterator[Array]:
        on = (a > self.level) & self.watched
        yield np.where(on, a, 0.0)
        # Where the threshold is 0 the code is continuous, so either side gives the same row.
        close = self.watched & (self.level > 0) & (np.abs(a - self.level) <= CLOSE * self.level)
        for i in np.flatnonzero(close):
            flipped = on.copy()
            flipped[i] = not flipped[i]
            yield np.where(flipped, a, 0.0)
