"""Pairs by joint distance: the rule held against its definition, seeds, resumes, exclusions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daco_rt.concepts import WordConcept
from daco_rt.corpus import Pair, load_pairs, save_pairs
from daco_rt.errors import ArtifactError, DacoError

pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra 'corpus')")

from daco_rt.corpus import retrieve as retrieve_module
from daco_rt.corpus.embeddings import create_embeddings, open_embeddings
from daco_rt.corpus.near import DistinctCaptions, normal_form
from daco_rt.corpus.retrieve import concept_prompts, retrieve_pairs

D, CONCEPTS, PAIRS, SHARD = 24, 9, 400, 150
TABLE = tuple(
    WordConcept(f"{name}.n.01", name, topic="artifact", gloss=f"a kind of {name}; something else")
    for name in ("dagger", "soup", "truck", "house", "lake", "apple", "violin", "crane", "box")
)


class KnownVectors:
    """An encoder whose vectors are known: one for each concept's prompt."""

    dim, has_images = D, True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rows = np.random.default_rng(seed).normal(size=(CONCEPTS, D))
        self.vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        names = [concept.name for concept in TABLE]
        return np.stack([self.vectors[next(i for i, n in enumerate(names) if n in text)] for text in texts])

    def images(self, images: Sequence[Any]) -> np.ndarray:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {"name": "known", "weights": f"seed {self.seed}", "dim": D, "images": True}


ENCODER = KnownVectors()


def captions() -> list[str]:
    """Every fifth caption is that of an earlier pair of its topic, but for case and punctuation."""
    random = np.random.default_rng(3)
    words = [
        "red",
        "old",
        "small",
        "wooden",
        "tall",
        "broken",
        "shiny",
        "two",
        "new",
        "heavy",
        "street",
        "table",
    ]
    made: list[str] = []
    for i in range(PAIRS):
        if i % 5 == 4 and i >= CONCEPTS:
            made.append(made[i - CONCEPTS].upper() + "!")
        else:
            made.append(f"{' '.join(random.choice(words, 4))} {TABLE[i % CONCEPTS].name} number {i}")
    return made


CAPTIONS_HERE = captions()


@pytest.fixture(scope="module", params=[True, False], ids=["pictures", "text alone"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    random = np.random.default_rng(4)
    topic = ENCODER.vectors[np.arange(PAIRS) % CONCEPTS]
    tables = [share * topic + random.normal(size=(PAIRS, D)) / 5 for share in (0.4, 1.0)]
    made = create_embeddings(
        tmp_path_factory.mktemp("store") / "e", encoder=ENCODER.describe(), corpus={"kind": "x"}, dim=D,
        images=request.param, shard_pairs=SHARD,
    )  # fmt: skip
    for shard, start in enumerate(range(0, PAIRS, SHARD)):
        rows = range(start, min(start + SHARD, PAIRS))
        pairs = [Pair(f"p{i}", CAPTIONS_HERE[i], f"{i}.png" if request.param else "") for i in rows]
        part = slice(rows.start, rows.stop)
        made.add(shard, pairs, tables[1][part], tables[0][part] if request.param else None)
    made.finish(3)
    return open_embeddings(made.path)


def retrieve(store: Any, **options: Any) -> Any:
    settings = {"count": 12, "sample": 200, "progress": False, **options}
    return retrieve_pairs(store, TABLE, ENCODER, **settings)


def definition(store: Any, query: np.ndarray) -> np.ndarray:
    """ln s_img + ln s_txt of one concept and every pair."""
    score = np.zeros(PAIRS)
    for part in store.block(0, PAIRS):
        if part is not None:
            score += np.log(np.clip((1 + part.astype(float) @ query.astype(float)) / 2, 1e-6, 1))
    return score


def rows_of(found: Any, concept: int, sign: int) -> list[int]:
    columns = found.columns
    keys = zip(columns["concept"], columns["sign"], columns["pair"], strict=True)
    return [int(pair[1:]) for c, s, pair in keys if (c, s) == (concept, sign)]


def test_pairs_are_those_of_the_definition(store: Any):
    found = retrieve(store)
    sample = np.sort(np.random.default_rng(0).choice(PAIRS, 200, replace=False))
    for concept, query in enumerate(ENCODER.vectors):
        score = definition(store, query)
        distinct = DistinctCaptions()
        nearest = [
            int(row) for row in np.argsort(-score, kind="stable") if distinct.admit(CAPTIONS_HERE[row])
        ]
        positive, negative = rows_of(found, concept, 1), rows_of(found, concept, -1)
        assert positive == nearest[:12]
        assert len(negative) == 12 and set(negative) <= set(sample.tolist())
        assert score[negative].max() < np.median(score[sample])
        forms = [normal_form(CAPTIONS_HERE[row]) for row in positive + negative]
        assert len(set(forms)) == len(forms)
    dist = np.array(found.columns["score"])
    want = [
        definition(store, ENCODER.vectors[c])[int(p[1:])]
        for c, p in zip(found.columns["concept"], found.columns["pair"], strict=True)
    ]
    assert dist == pytest.approx(np.sqrt(-np.array(want)), abs=1e-6)
    assert (
        found.counts == dict.fromkeys(range(CONCEPTS), (12, 12))
        and found.skipped["near-duplicate caption"] > 0
    )


def test_negatives_are_a_uniform_draw(store: Any):
    """Over many seeds every pair below the median is drawn about equally often."""
    drawn = np.zeros(PAIRS)
    for seed in range(60):
        found = retrieve(store, seed=seed, sample=PAIRS, count=6)
        drawn[rows_of(found, 0, -1)] += 1
    score = definition(store, ENCODER.vectors[0])
    below = score < np.median(score)
    assert drawn[~below].sum() == 0
    half = np.argsort(score)[: below.sum()]
    nearer, farther = drawn[half[len(half) // 2 :]].sum(), drawn[half[: len(half) // 2]].sum()
    # 360 draws: the share of either half lies within 4 standard deviations of one half.
    assert abs(nearer / 360 - 0.5) < 4 * 0.5 / np.sqrt(360) and nearer + farther == 360


def test_equal_seeds_give_equal_pairs_whatever_the_blocks(store: Any, tmp_path: Path):
    whole = retrieve(store)
    for block in (1, 4):
        assert retrieve(store, block=block).columns == whole.columns
    assert retrieve(store, seed=1).columns != whole.columns
    # A concept's pairs do not depend on which others there are.
    alone = retrieve_pairs(store, TABLE[3:5], ENCODER, count=12, sample=200, progress=False)
    assert [rows_of(alone, 0, sign) for sign in (1, -1)] == [rows_of(whole, 3, sign) for sign in (1, -1)]


def test_a_killed_retrieval_goes_on_and_ends_the_same(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, real, calls = retrieve(store), retrieve_module.nearest_pairs, []

    def dying(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(retrieve_module, "nearest_pairs", dying)
    with pytest.raises(KeyboardInterrupt):
        retrieve(store, block=2, work=tmp_path / "w")
    with pytest.raises(ArtifactError, match="another count, seed"):
        retrieve(store, block=2, work=tmp_path / "w", seed=1, count=11)
    found = retrieve(store, block=2, work=tmp_path / "w")
    assert len(calls) == 3 + 3, "two of five blocks were there"
    assert (found.columns, found.counts, found.skipped) == (whole.columns, whole.counts, whole.skipped)


def test_concepts_with_too_few_pairs_are_left_out_and_named(store: Any):
    score = np.sqrt(np.sort(-definition(store, ENCODER.vectors[2]))[5]) + 1e-9
    found = retrieve(store, farthest=float(score))
    assert all(
        d <= score for d, s in zip(found.columns["score"], found.columns["sign"], strict=True) if s > 0
    )
    assert 2 in found.counts and found.counts[2][0] == found.counts[2][1] <= 6
    assert len(found.counts) + len(found.excluded) == CONCEPTS and found.excluded
    assert all(number < 4 for number in found.excluded.values())
    with pytest.raises(DacoError, match="none of the 9 concepts has 4 pairs"):
        retrieve(store, farthest=0.001)


def test_copies_of_a_caption_are_allowed_when_asked(store: Any):
    score = definition(store, ENCODER.vectors[0])
    order = np.argsort(-score, kind="stable").tolist()
    assert rows_of(retrieve(store, copies=2), 0, 1) == order[:12]


def test_another_encoder_is_refused(store: Any):
    with pytest.raises(ArtifactError, match=r"made by known \(weights seed 0\)"):
        retrieve_pairs(store, TABLE, KnownVectors(1), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimum": 0}, "minimum of pairs"),
        ({"minimum": 13}, "minimum of pairs"),
        ({"sample": 23}, "twice the count"),
        ({"copies": 0}, "at least one pair"),
        ({"prompt": "a {nme}"}, "no template of {name}"),
    ],
)
def test_numbers_out_of_range_are_refused(store: Any, options: dict[str, Any], message: str):
    with pytest.raises(DacoError, match=message):
        retrieve(store, **options)


def test_prompts():
    assert concept_prompts(TABLE[:1]) == ["a photo of a dagger"]
    assert concept_prompts(TABLE[5:6], "{name}|{gloss}", gloss=True) == [
        "apple|a kind of apple: a kind of apple"
    ]


def test_pairs_are_a_table_with_the_words_marked(store: Any, tmp_path: Path):
    found = retrieve(store)
    path = save_pairs(found.columns, tmp_path / "p.parquet", root=tmp_path, settings=found.settings)
    table = load_pairs(path)
    assert table["pair"].to_pylist() == found.columns["pair"]
    said = 0
    for row in table.to_pylist():
        if row["start"] >= 0:
            said += 1
            assert row["caption"][row["start"] : row["end"]].lower() == row["name"]
        else:
            assert row["name"] not in row["caption"].lower().split()
        assert (row["image_similarity"] is None) != store.images
    assert said > CONCEPTS * 6
