"""The nearest pairs of every concept, exactly, among millions: one matrix product and a bound.

The score of a pair with cosines a (picture) and b (caption) is ``ln s(a) + ln s(b)``, s(x) = (1 + x)/2
between ε and 1. Its logarithms are concave, so at any point (a₀, b₀) the tangent plane lies above it:

    score ≤ U = K + a/(1 + a₀) + b/(1 + b₀),    K = Σ ln((1 + x₀)/2) − x₀/(1 + x₀)

and U is K plus *one* inner product, of the concept with m = i/(1 + a₀) + t/(1 + b₀). So the blocked product
of concepts and m says which pairs can be among the n nearest at all; for those alone both cosines are
computed in float64. With (a₀, b₀) where the nearest pairs lie the bound is tight, and little more than n
pairs pass it.

The product may be rounded (fp32, or bf16 where that is faster): the bound is widened by the worst that
rounding can do, so that precision, tiles, threads and device change the time and never the answer. Ties go to
the lower index.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

EPSILON = 1e-6
_PAD = 8  # columns behind the vectors: the threshold in three parts, and zeros to an even width
_CHUNK_CPU, _CHUNK_DEVICE = 128, 16_384  # pairs scored at once: on a CPU their vectors stay in its caches
_FLOOR = -1e4  # stands for "no threshold yet"; no score is below 2 ln ε ≫ this


class PairVectors(Protocol):
    """Embeddings of pairs by number: rows of norm 1, float16 or float32; ``image`` is None for text alone."""

    @property
    def rows(self) -> int: ...
    @property
    def dim(self) -> int: ...
    def block(self, start: int, stop: int) -> tuple[np.ndarray | None, np.ndarray]: ...
    def take(self, rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]: ...


@dataclass(frozen=True)
class ArrayVectors:
    """``PairVectors`` of arrays in memory or mapped, [rows, dim] each."""

    image: np.ndarray | None
    text: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.text)

    @property
    def dim(self) -> int:
        return self.text.shape[1]

    def block(self, start: int, stop: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Return image and text embeddings of a range of pairs."""
        return None if self.image is None else self.image[start:stop], self.text[start:stop]

    def take(self, rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """Return image and text embeddings of some pairs."""
        return None if self.image is None else self.image[rows], self.text[rows]


@dataclass(frozen=True)
class SearchPlan:
    """Where and how the products run; nothing of it changes the result.

    ``precision`` is "fp32", "bf16", or "auto" for what a short trial on the device finds faster; ``pairs``
    and ``queries`` are the sides of a tile of the product. Memory beside the embeddings: about
    ``pairs × (8·dim + 2·queries)`` bytes.
    """

    device: str = "cpu"
    precision: str = "auto"
    pairs: int = 8192
    queries: int = 2048

    def resolved(self, dim: int) -> SearchPlan:
        """Return the plan with a precision."""
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision must be auto, fp32 or bf16, got {self.precision!r}")
        if self.pairs < 1 or self.queries < 1:
            raise ValueError(f"tiles must have at least one row, got {self.pairs} × {self.queries}")
        if self.precision != "auto":
            return self
        spent: dict[str, float] = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a = torch.ones(1024, dim, dtype=dtype, device=self.device)
            for _ in range(3):
                began = time.perf_counter()
                float((a @ a.T)[0, 0])  # reading a value waits for the device
                spent[name] = min(spent.get(name, np.inf), time.perf_counter() - began)
        return SearchPlan(self.device, min(spent, key=spent.__getitem__), self.pairs, self.queries)


@dataclass
class Nearest:
    """For each query its n nearest pairs, the nearest first; index −1 and score −inf where there are fewer.

    ``index`` int64 [Q, n]; ``score``, ``image``, ``text`` float64 [Q, n]: ln s_img + ln s_txt, s_img (NaN
    without pictures), s_txt. ``scored`` is how many pairs passed the bound.
    """

    index: np.ndarray
    score: np.ndarray
    image: np.ndarray
    text: np.ndarray
    scored: int = 0


def similarity(cosine: Any, epsilon: float = EPSILON) -> Any:
    """Return s = (1 + cos)/2 between ε and 1, of a tensor; stored vectors are rounded and can pass 1 by a
    little."""
    return ((1 + cosine) * 0.5).clamp(epsilon, 1.0)


def nearest_pairs(
    queries: np.ndarray,
    vectors: PairVectors,
    n: int,
    *,
    sample: np.ndarray,
    epsilon: float = EPSILON,
    plan: SearchPlan | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Nearest:
    """Return the n pairs of highest score for each query, exactly, ties to the lower index.

    Parameters
    ----------
    queries : [Q, dim] fp32 of norm 1.
    vectors : the pairs.
    n : how many.
    sample : numbers of some pairs, each once; their scores place the tangent point and the first thresholds.
    A
        few thousand serve; any choice gives the same result.
    epsilon : ε, at most 0.01.
    plan : device and tiles.
    advance : told how many pairs were passed.

    Notes
    -----
    Time: Q × rows × dim products, one matrix product; memory: see ``SearchPlan``, and 40 bytes for each of
    about 2 n candidates a query. The embeddings are read once, in order.

    Example
    -------
    >>> found = nearest_pairs(concepts, store, 27, sample=np.arange(0, store.rows, 100))
    >>> found.index.shape
    (2048, 27)
    """
    if not 0 < epsilon <= 0.01:
        raise ValueError(f"epsilon must lie between 0 and 0.01, got {epsilon}")
    plan = (plan or SearchPlan()).resolved(vectors.dim)
    with _full_precision(), torch.inference_mode():
        scan = _Scan(queries, vectors, n, epsilon, plan)
        scan.seed(np.sort(sample))
        for start in range(0, vectors.rows, plan.pairs):
            stop = min(start + plan.pairs, vectors.rows)
            scan.pass_over(start, *vectors.block(start, stop))
            advance(stop - start)
        return scan.finish()


def sample_scores(
    queries: np.ndarray,
    image: np.ndarray | None,
    text: np.ndarray,
    *,
    epsilon: float = EPSILON,
    device: str = "cpu",
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (number of the first query, scores [≤ 256, pairs] fp32) of every query and some pairs."""
    with _full_precision(), torch.inference_mode():
        pictures = None if image is None else _load(image, device).T.contiguous()
        captions = _load(text, device).T.contiguous()
        for start in range(0, len(queries), 256):
            query = _load(queries[start : start + 256], device)
            score = similarity(query @ captions, epsilon).log_()
            if pictures is not None:
                score += similarity(query @ pictures, epsilon).log_()
            yield start, score


class _Scan:
    def __init__(
        self, queries: np.ndarray, vectors: PairVectors, n: int, epsilon: float, plan: SearchPlan
    ) -> None:
        self.vectors, self.n, self.epsilon, self.plan = vectors, n, epsilon, plan
        self.count, self.dim = queries.shape
        self.pictures = vectors.block(0, 0)[0] is not None
        self.queries = _load(queries, plan.device)
        self.dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
        self.left = torch.zeros(self.count, self.dim + _PAD, dtype=self.dtype, device=plan.device)
        self.left[:, : self.dim] = self.queries
        self.norm = float(self.queries.norm(dim=1).max()) if self.count else 1.0
        self.threshold = np.full(self.count, _FLOOR)
        self.point = (0.25, 0.75)
        self.held: list[tuple[np.ndarray, ...]] = []
        self.pending = self.scored = 0

    def seed(self, sample: np.ndarray) -> None:
        """Take first thresholds and the tangent point from a sample of the pairs."""
        if len(sample) == 0:
            return
        image, text = self.vectors.take(sample)
        parts = [None if part is None else _load(part, self.plan.device) for part in (image, text)]
        points = []
        scores = sample_scores(
            self.queries.numpy(force=True), image, text, epsilon=self.epsilon, device=self.plan.device
        )
        for start, score in scores:
            inside = slice(start, start + len(score))
            if len(sample) >= self.n:
                # The n-th best of a part is no better than the n-th best of all.
                worst = score.topk(self.n, dim=1).values[:, -1].double().numpy(force=True)
                self.threshold[inside] = _below(worst, self.dim)
            best = score.topk(min(8, len(sample)), dim=1).indices
            query = self.queries[inside]
            points.append(
                [
                    0.0 if part is None else float(torch.einsum("qd,qkd->qk", query, part[best]).mean())
                    for part in parts
                ]
            )
        # Far from -1 the plane's weights stay small, and with them the error of its products.
        a, b = np.clip(np.mean(points, axis=0), -0.5, 0.99)
        self.point = float(a), float(b)

    def pass_over(self, start: int, image: np.ndarray | None, text: np.ndarray) -> None:
        """Score the pairs of one tile that can be among the nearest."""
        pictures = None if image is None else _load(image, self.plan.device)
        captions = _load(text, self.plan.device)
        weights, offset = self._plane()
        mixed = captions * weights[1]
        if pictures is not None:
            mixed.add_(pictures, alpha=weights[0])
        right = torch.zeros(len(captions), self.dim + _PAD, dtype=self.dtype, device=self.plan.device)
        right[:, : self.dim] = mixed
        right[:, self.dim : self.dim + 3] = 1.0
        self._write_threshold(offset, float(mixed.norm(dim=1).max()))
        for first in range(0, self.count, self.plan.queries):
            product = self.left[first : first + self.plan.queries] @ right.T
            query, pair = _not_negative(product)
            self._score(query + first, pair, start, pictures, captions, mixed, offset)
        if self.pending > max(4 * self.n, self.n * self.count // 2):
            self._compact()

    def finish(self) -> Nearest:
        """Return the nearest of everything passed over."""
        self._compact()
        shape = self.count, self.n
        found = Nearest(
            np.full(shape, -1, np.int64),
            np.full(shape, -np.inf),
            np.full(shape, np.nan),
            np.full(shape, np.nan),
            self.scored,
        )
        if self.held:
            query, index, score, image, text = self.held[0]
            rank = np.arange(len(query)) - np.searchsorted(query, query)
            for target, values in zip(
                (found.index, found.score, found.image, found.text), (index, score, image, text), strict=True
            ):
                target[query, rank] = values
        return found

    def _plane(self) -> tuple[tuple[float, float], float]:
        """Weights of the tangent plane and its constant K."""
        weights = tuple(1 / (1 + x) for x in self.point)
        used = zip(self.point, weights, strict=True) if self.pictures else [(self.point[1], weights[1])]
        offset = sum(np.log((1 + x) / 2) - x * weight for x, weight in used)
        return (weights[0], weights[1]), float(offset)

    def _write_threshold(self, offset: float, norm: float) -> None:
        """Put into the queries' last columns what makes the product U − threshold + the most it can be short.

        ``norm`` is the largest of the tile's rows. Both factors are rounded, once each; the sum is in fp32.
        """
        rest = offset - self.threshold
        size = self.norm * norm
        unit = 2.0**-8 if self.dtype == torch.bfloat16 else 2.0**-24
        largest = np.abs(rest[self.threshold > _FLOOR]).max(initial=1.0)
        rest = rest + (2 * unit + unit**2) * size + (self.dim + _PAD) * 2.0**-23 * (size + largest)
        left = torch.from_numpy(rest).to(self.plan.device)
        for column in range(3):
            part = left.to(self.dtype)
            self.left[:, self.dim + column] = part
            left = left - part.double()

    def _score(
        self,
        query: np.ndarray,
        pair: np.ndarray,
        start: int,
        pictures: torch.Tensor | None,
        captions: torch.Tensor,
        mixed: torch.Tensor,
        offset: float,
    ) -> None:
        if self.dtype == torch.bfloat16:
            # Most of what passed did so by the allowance for bf16: one fp32 product a pair tells.
            bound = _products(self.queries, query, mixed, pair, torch.float32) + offset
            inside = bound >= self.threshold[query] - 2.0**-21 * (self.dim + _PAD)
            query, pair = query[inside], pair[inside]
        self.scored += len(query)
        text = self._similarity(query, captions, pair)
        score, image = np.log(text), np.full(len(query), np.nan)
        if pictures is not None:
            image = self._similarity(query, pictures, pair)
            score += np.log(image)
        kept = score >= self.threshold[query]
        self.held.append((query[kept], pair[kept] + start, score[kept], image[kept], text[kept]))
        self.pending += int(kept.sum())

    def _similarity(self, query: np.ndarray, vectors: torch.Tensor, pair: np.ndarray) -> np.ndarray:
        cosine = _products(self.queries, query, vectors, pair, torch.float64)
        return np.clip((1 + cosine) / 2, self.epsilon, 1.0)

    def _compact(self) -> None:
        """Keep the n best of each query and raise the thresholds to the n-th."""
        if not self.held:
            return
        columns = [np.concatenate(parts) for parts in zip(*self.held, strict=True)]
        order = np.lexsort((columns[1], -columns[2], columns[0]))
        columns = [column[order] for column in columns]
        rank = np.arange(len(order)) - np.searchsorted(columns[0], columns[0])
        last = rank == self.n - 1
        self.threshold[columns[0][last]] = np.maximum(self.threshold[columns[0][last]], columns[2][last])
        kept = rank < self.n
        self.held = [tuple(column[kept] for column in columns)]
        self.pending = 0


def _below(score: np.ndarray, dim: int) -> np.ndarray:
    """A bound below the true score, given one from fp32 products: of a cosine off by δ, ln s is off by
    δ/2s."""
    error = (dim + 8) * 2.0**-23
    least = np.exp(np.minimum(score, 0.0))  # of a product of two s ≤ 1, each is at least the product
    safe = least > 8 * error
    return np.where(safe, score - 2 * error / np.where(safe, least - 2 * error, 1.0) - 1e-5, _FLOOR)


def _not_negative(product: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the elements that are at least 0, by rows."""
    if product.device.type != "cpu":
        rows, columns = (product >= 0).nonzero(as_tuple=True)
        return rows.numpy(force=True), columns.numpy(force=True)
    # The sign bit, read as an integer's, strip by strip in the cache: torch's nonzero takes longer than the
    # product itself.
    bits = product.view(torch.int16 if product.dtype == torch.bfloat16 else torch.int32).numpy()
    width = bits.shape[1]
    step = max(1, (1 << 19) // width)
    hits = [np.flatnonzero(bits[at : at + step] >= 0) + at * width for at in range(0, len(bits), step)]
    return np.divmod(np.concatenate(hits), width)


def _products(
    left: torch.Tensor, rows: np.ndarray, right: torch.Tensor, columns: np.ndarray, dtype: torch.dtype
) -> np.ndarray:
    """Inner products of pairs of rows, each on its own, so that its value depends on nothing else;
    float64."""
    found = np.empty(len(rows))
    on_cpu = left.device.type == "cpu"
    step = _CHUNK_CPU if on_cpu else _CHUNK_DEVICE
    for at in range(0, len(rows), step):
        i, j = rows[at : at + step], columns[at : at + step]
        if on_cpu:
            # One thread: waiting for others would take longer than the work.
            kind = np.float64 if dtype == torch.float64 else np.float32
            a, b = left.numpy()[i].astype(kind, copy=False), right.numpy()[j].astype(kind, copy=False)
            found[at : at + step] = np.einsum("hd,hd->h", a, b)
        else:
            a, b = (
                part[torch.from_numpy(k).to(left.device)].to(dtype) for part, k in ((left, i), (right, j))
            )
            found[at : at + step] = (a * b).sum(1).numpy(force=True)
    return found


def _load(array: np.ndarray, device: str) -> torch.Tensor:
    """A mapped, read-only array as fp32 on the device."""
    return torch.from_numpy(np.array(array, np.float32)).to(device)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Hold torch to fp32 products and fp32 sums of bf16 products, which the bounds assume."""
    before = torch.get_float32_matmul_precision()
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
