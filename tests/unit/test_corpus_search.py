"""The exact search against a brute-force reference in float64: the same pairs in the same order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from daco_rt.corpus.search import ArrayVectors, SearchPlan, nearest_pairs, sample_scores

D, QUERIES, PAIRS = 40, 70, 3000


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries fp32, picture and caption embeddings fp16 that are near some of them, many of them equal."""
    random = np.random.default_rng(5)
    queries = unit(random.normal(size=(QUERIES, D)))
    topic = queries[random.integers(0, QUERIES, PAIRS)]
    image = unit(0.35 * topic + unit(random.normal(size=(PAIRS, D))))
    text = unit(topic + unit(random.normal(size=(PAIRS, D))))
    image[500:540], text[500:540] = image[7], text[7]
    image[2000:2100], text[2000:2100] = image[3], text[3]
    return queries.astype(np.float32), image.astype(np.float16), text.astype(np.float16)


def brute(
    queries: np.ndarray, image: np.ndarray | None, text: np.ndarray, n: int, epsilon: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    score = np.zeros((len(queries), len(text)))
    for part in (image, text):
        if part is not None:
            cosine = np.stack([np.einsum("pd,d->p", part.astype(float), q.astype(float)) for q in queries])
            score += np.log(np.clip((1 + cosine) / 2, epsilon, 1))
    order = np.argsort(-score, axis=1, kind="stable")[:, :n]
    return order, np.take_along_axis(score, order, axis=1)


PLANS = [
    SearchPlan(precision=precision, pairs=pairs, queries=queries)
    for precision in ("fp32", "bf16")
    for pairs, queries in ((8192, 2048), (777, 33), (1, 1000))
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.precision}-{p.pairs}x{p.queries}")
@pytest.mark.parametrize("pictures", [True, False])
def test_nearest_are_those_of_brute_force_in_order(data: Any, plan: SearchPlan, pictures: bool):
    queries, image, text = data
    if plan.pairs == 1:
        image, text = image[:600], text[:600]
    image = image if pictures else None
    order, score = brute(queries, image, text, 60)
    found = nearest_pairs(
        queries, ArrayVectors(image, text), 60, sample=np.arange(0, len(text), 9), plan=plan
    )
    assert (found.index == order).all()
    assert np.abs(found.score - score).max() < 1e-12
    assert np.isnan(found.image).all() != pictures
    parts = [np.log(found.text)] + ([np.log(found.image)] if pictures else [])
    assert np.abs(sum(parts) - found.score).max() < 1e-12


@pytest.mark.parametrize("sample", [0, 1, 59, 60, 3000])
def test_the_sample_changes_the_time_only(data: Any, sample: int):
    queries, image, text = data
    order, _ = brute(queries, image, text, 60)
    rows = np.random.default_rng(1).choice(PAIRS, sample, replace=False)
    found = nearest_pairs(queries, ArrayVectors(image, text), 60, sample=rows)
    assert (found.index == order).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ties_go_to_the_lower_index(precision: str):
    random = np.random.default_rng(2)
    query = unit(random.normal(size=(3, D))).astype(np.float32)
    one = unit(random.normal(size=(2, D))).astype(np.float16)
    image, text = np.repeat(one[:1], 400, axis=0), np.repeat(one[1:], 400, axis=0)
    plan = SearchPlan(precision=precision, pairs=64, queries=2)
    found = nearest_pairs(query, ArrayVectors(image, text), 5, sample=np.arange(300, 400), plan=plan)
    assert found.index.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_opposite_and_equal_vectors_stay_within_epsilon_and_one():
    query = np.eye(1, D, dtype=np.float32)
    image = np.concatenate([-query, query * 1.001, query, -query * 1.001]).astype(np.float16)
    for epsilon in (1e-6, 1e-2):
        found = nearest_pairs(query, ArrayVectors(image, image), 4, sample=np.arange(4), epsilon=epsilon)
        assert found.index.tolist() == [[1, 2, 0, 3]]
        assert found.score[0] == pytest.approx([0, 0, 2 * np.log(epsilon), 2 * np.log(epsilon)])


def test_fewer_pairs_than_wanted_leave_places_empty(data: Any):
    queries, image, text = data
    found = nearest_pairs(queries, ArrayVectors(image[:7], text[:7]), 10, sample=np.arange(7))
    order, _ = brute(queries, image[:7], text[:7], 10)
    assert (found.index[:, :7] == order).all()
    assert (found.index[:, 7:] == -1).all() and np.isneginf(found.score[:, 7:]).all()
    empty = nearest_pairs(queries, ArrayVectors(image[:0], text[:0]), 3, sample=np.arange(0))
    assert (empty.index == -1).all()


def test_far_vectors_with_a_bad_tangent_point_are_still_exact():
    """A sample of the farthest pairs puts the plane at the wrong end: slower, and right."""
    random = np.random.default_rng(8)
    queries = unit(random.normal(size=(20, D))).astype(np.float32)
    image = unit(
        np.concatenate([-queries.mean(0) + 0.1 * random.normal(size=(300, D)), random.normal(size=(900, D))])
    )
    image = image.astype(np.float16)
    text = image[::-1].copy()
    order, _ = brute(queries, image, text, 25)
    for plan in PLANS[1:5:3]:
        found = nearest_pairs(queries, ArrayVectors(image, text), 25, sample=np.arange(300), plan=plan)
        assert (found.index == order).all()


def test_pairs_that_bf16_cannot_tell_apart_are_not_lost():
    """Pairs around one point, where the bound is tight: only the allowance for rounding keeps them."""
    random = np.random.default_rng(9)
    queries = unit(random.normal(size=(1, D))).astype(np.float32)
    made = []
    for share in (0.3, 0.9):
        base = unit(share * queries[:1] + unit(random.normal(size=(1, D))))
        made.append(unit(base + 1e-3 * random.normal(size=(4000, D))).astype(np.float16))
    order, score = brute(queries, *made, 40)
    assert np.ptp(score[0]) < 2.0**-8
    for plan in PLANS[:1] + PLANS[3:5]:
        found = nearest_pairs(queries, ArrayVectors(*made), 40, sample=np.arange(0, 4000, 2), plan=plan)
        assert (found.index == order).all()


def test_few_pairs_pass_the_bound(data: Any):
    queries, image, text = data
    vectors = ArrayVectors(image, text)
    found = nearest_pairs(
        queries, vectors, 10, sample=np.arange(0, PAIRS, 3), plan=SearchPlan(precision="fp32")
    )
    assert QUERIES * 10 <= found.scored < QUERIES * 60


def test_the_settings_of_torch_are_put_back_and_do_not_matter(data: Any):
    queries, image, text = data
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = nearest_pairs(
            queries, ArrayVectors(image, text), 60, sample=np.arange(100), plan=SearchPlan(precision="fp32")
        )
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (found.index == brute(queries, image, text, 60)[0]).all()


def test_scores_of_a_sample_are_those_of_the_definition(data: Any):
    queries, image, text = data
    tiles = dict(sample_scores(queries, image[:50], text[:50]))
    order, score = brute(queries, image[:50], text[:50], 50)
    got = np.concatenate([tiles[start].numpy() for start in sorted(tiles)])
    assert np.abs(np.take_along_axis(got, order, 1) - score).max() < 1e-5


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (SearchPlan(precision="fp8"), {}, "auto, fp32 or bf16"),
        (SearchPlan(pairs=0), {}, "at least one row"),
        (SearchPlan(), {"epsilon": 0.1}, "epsilon must lie"),
    ],
)
def test_arguments_out_of_range_are_refused(
    data: Any, plan: SearchPlan, options: dict[str, float], message: str
):
    queries, image, text = data
    with pytest.raises(ValueError, match=message):
        nearest_pairs(queries, ArrayVectors(image, text), 3, sample=np.arange(5), plan=plan, **options)
