"""Directions from means: the algebra of centres, exclusion, shared components, the artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from means_samples import make_means

from daco_rt.artifacts import load_dictionary
from daco_rt.cli import main
from daco_rt.dictionary import block_directions, build_dictionary
from daco_rt.dictionary.directions import default_centre, leading_components, select_rows
from daco_rt.errors import ArtifactError, DacoError

N, D = 40, 24


def contrast(positive: np.ndarray, negative: np.ndarray, ordinary: np.ndarray, centre: str) -> np.ndarray:
    """The definition, one concept at a time in float64."""
    rows = []
    for i, own in enumerate(positive.astype(np.float64)):
        others = np.delete(positive.astype(np.float64), i, axis=0).mean(axis=0)
        rows.append(
            own
            - {
                "others": others,
                "negatives": negative[i].astype(np.float64),
                "ordinary": ordinary.astype(np.float64),
                "none": 0.0,
            }[centre]
        )
    return np.array(rows)


@pytest.mark.parametrize("centre", ["others", "negatives", "ordinary", "none"])
def test_directions_are_means_less_their_centre(tmp_path: Path, centre: str) -> None:
    rng = np.random.default_rng(1)
    # A shared part of a hundred times the concepts' own: what cancels must not take the rest with it.
    positive = (100 * rng.standard_normal(D) + rng.standard_normal((N, D))).astype(np.float32)
    negative = (100 * rng.standard_normal(D) + rng.standard_normal((N, D))).astype(np.float32)
    means = make_means(tmp_path / "m", {3: positive}, {3: negative})
    chosen = select_rows(means, centre=centre)
    found = block_directions(means, 3, chosen.rows, centre=centre)
    wanted = contrast(positive, negative, means.ordinary(3), centre)
    norms = np.linalg.norm(wanted, axis=1)
    np.testing.assert_allclose(found.norms, norms, rtol=2e-5)
    np.testing.assert_allclose(found.atoms, wanted / norms[:, None], atol=2e-5)
    assert found.atoms.dtype == np.float32 and found.shared.shape == (0, D)
    np.testing.assert_array_equal(means.mean(3), positive)


def test_shared_components_are_taken_out_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    common = np.linalg.qr(rng.standard_normal((D, 2)))[0].T
    own = rng.standard_normal((N, D)) * 0.3
    positive = (own + rng.standard_normal((N, 2)) * [[5.0, 3.0]] @ common).astype(np.float32)
    means = make_means(tmp_path / "m", {3: positive})
    rows = np.arange(N)
    plain = block_directions(means, 3, rows)
    found = block_directions(means, 3, rows, remove_shared=2)
    wanted = contrast(positive, positive, positive[0], "others")
    unit = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    leading = np.linalg.svd(unit)[2][:2]
    rest = unit - unit @ leading.T @ leading
    lengths = np.linalg.norm(rest, axis=1)
    np.testing.assert_allclose(found.atoms, rest / lengths[:, None], atol=1e-4)
    np.testing.assert_allclose(found.norms, plain.norms * lengths, rtol=1e-4)
    assert np.abs(found.atoms @ found.shared.T).max() < 1e-5
    assert found.share == pytest.approx(1 - (lengths**2).mean(), abs=1e-5) and found.share > 0.8
    # Orthonormal, and the same plane as the planted one but for noise.
    np.testing.assert_allclose(found.shared @ found.shared.T, np.eye(2), atol=1e-6)
    assert np.linalg.svd(found.shared @ common.T)[1].min() > 0.97


def test_leading_components_are_singular_vectors() -> None:
    matrix = np.random.default_rng(3).standard_normal((2500, 7)) * [9, 7, 5, 3, 1, 1, 1]
    components, share = leading_components(matrix, 3)
    _, values, vectors = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(np.abs(components @ vectors[:3].T), np.eye(3), atol=1e-9)
    assert share == pytest.approx((values[:3] ** 2).sum() / (values**2).sum())


def test_concepts_read_too_rarely_are_left_out_and_named(tmp_path: Path, capsys: Any) -> None:
    rng = np.random.default_rng(4)
    positive = {block: rng.standard_normal((6, D)).astype(np.float32) for block in (1, 2)}
    positive[1][4] = 1e6  # what is left out must not move the contrast of the rest
    counts = {1: np.array([7, 7, 7, 7, 0, 7]), 2: np.array([7, 3, 7, 7, 7, 4])}
    means = make_means(tmp_path / "m", positive, counts=counts)
    dictionary = build_dictionary(means, tmp_path / "d", minimum=4, progress=False)
    assert [concept.name for concept in dictionary.concepts] == ["c0", "c2", "c3", "c5"]
    assert [concept.index for concept in dictionary.concepts] == [0, 1, 2, 3]
    assert dictionary.concepts[3].synset == "c5.n.01" and dictionary.concepts[3].gloss == "gloss 5"
    assert dictionary.recipe["excluded"] == {"c1": 3, "c4": 0}
    kept = positive[1][[0, 2, 3, 5]]
    wanted = contrast(kept, kept, kept[0], "others")
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(dictionary.atoms(1).astype(np.float64), wanted, atol=1e-3)
    everything = select_rows(means, minimum=1)
    assert list(everything.excluded) == ["c4"]
    command = ["dictionary", str(means.path), "--output", str(tmp_path / "said")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "left out with fewer than 4 readings: c1 (3), c4 (0); all are named in manifest.json" in said
    assert main([*command, "--force", "--minimum", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["excluded"] == {"c4": 0}


def test_negatives_count_only_where_they_are_the_centre(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    positive, negative = (rng.standard_normal((5, D)).astype(np.float32) for _ in range(2))
    means = make_means(
        tmp_path / "m", {1: positive}, {1: negative}, negative_counts={1: np.array([7, 7, 2, 7, 7])}
    )
    assert select_rows(means).excluded == {}
    assert select_rows(means, centre="negatives").excluded == {"c2": 2}


def test_the_artifact_has_unit_atoms_and_its_history(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    blocks = {block: rng.standard_normal((30, D)).astype(np.float32) for block in (2, 10, 11)}
    means = make_means(tmp_path / "m", blocks)
    built = build_dictionary(means, tmp_path / "d", remove_shared=1, progress=False)
    loaded = load_dictionary(built.path)
    assert (loaded.size, loaded.dim, loaded.dtype, loaded.blocks) == (30, D, "fp16", (2, 10, 11))
    assert loaded.model == means.model and loaded.median_norm == means.median_norm
    for block in blocks:
        atoms = loaded.atoms(block).astype(np.float64)
        np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1, atol=2e-3)
        np.testing.assert_array_equal(loaded.mean(block), means.ordinary(block))
        wanted = block_directions(means, block, np.arange(30), remove_shared=1)
        np.testing.assert_array_equal(loaded.atoms(block), wanted.atoms.astype(np.float16))
        assert loaded.recipe["norms"][str(block)]["0.5"] == pytest.approx(np.median(wanted.norms), abs=1e-3)
    recipe = loaded.recipe
    assert (recipe["centre"], recipe["remove_shared"], recipe["position"]) == ("others", 1, "word")
    assert recipe["harvest"] == means.recipe and 0 < recipe["shared_energy"]["10"] < 1
    with pytest.raises(ArtifactError, match="already exists"):
        build_dictionary(means, tmp_path / "d", progress=False)
    again = build_dictionary(means, tmp_path / "d", overwrite=True, progress=False)
    assert "shared_energy" not in again.recipe


def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    means = make_means(tmp_path / "m", {b: rng.standard_normal((9, D)).astype(np.float32) for b in range(4)})
    import weakref

    from daco_rt.dictionary import directions

    alive: list[Any] = []
    plain = directions.block_directions

    def watched(*arguments: Any, **options: Any) -> Any:
        assert not [ref for ref in alive if ref() is not None], "the block before is still there"
        found = plain(*arguments, **options)
        alive.append(weakref.ref(found.atoms))
        return found

    monkeypatch.setattr(directions, "block_directions", watched)
    build_dictionary(means, tmp_path / "d", progress=False)
    assert len(alive) == 4


def test_default_centre_follows_the_position(tmp_path: Path) -> None:
    assert [default_centre(p) for p in ("word", "word-mean", "before-word")] == ["others"] * 3
    assert [default_centre(p) for p in ("last", "last-prompt", "image", "all")] == ["negatives"] * 4
    rng = np.random.default_rng(8)
    positive, negative = (rng.standard_normal((5, D)).astype(np.float32) for _ in range(2))
    means = make_means(tmp_path / "m", {1: positive}, {1: negative}, position="last")
    dictionary = build_dictionary(means, tmp_path / "d", progress=False)
    assert dictionary.recipe["centre"] == "negatives"
    wanted = (positive - negative).astype(np.float64)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(dictionary.atoms(1).astype(np.float64), wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centre": "other"}, "centre 'other' is unknown; did you mean 'others'"),
        ({"remove_shared": -1}, f"between 0 and {D - 1}, got -1"),
        ({"remove_shared": D}, f"got {D}"),
        ({"minimum": 0}, "at least 1, got 0"),
        ({"minimum": 8}, "0 of 5 concepts have 8 readings"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(tmp_path: Path, options: Any, message: str) -> None:
    positive = np.random.default_rng(9).standard_normal((5, D)).astype(np.float32)
    means = make_means(tmp_path / "m", {1: positive})
    with pytest.raises(DacoError, match=message):
        build_dictionary(means, tmp_path / "d", progress=False, **options)
    assert not (tmp_path / "d").exists()


def test_equal_means_have_no_direction(tmp_path: Path) -> None:
    means = make_means(tmp_path / "m", {1: np.ones((3, D), np.float32)})
    with pytest.raises(DacoError, match="'c0' has no direction at block 1"):
        build_dictionary(means, tmp_path / "d", progress=False)
    assert not (tmp_path / "d").exists()
