"""Labelling latents by centroids, the sweep of η and γ, its figure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_samples as samples
from sae_samples import BLOCK, MODEL

from daco_rt.artifacts import Concept, Sae, load_sae, save_sae
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.sae import SweepPoint, annotate_sae, choose_point, label_latents, sweep_policies
from daco_rt.sae.annotate import centroid_cosines, count_labels
from daco_rt.sae.sweep import pareto_front


def sae_of(path: Path, decoder: np.ndarray, **options: Any) -> Sae:
    decoder = decoder.astype(np.float32)
    latents, dim = decoder.shape
    weights = {
        "W_enc": np.ascontiguousarray(decoder.T), "W_dec": decoder,
        "b_enc": np.linspace(-1, 1, latents).astype(np.float32), "b_dec": np.ones(dim, np.float32),
    }  # fmt: skip
    return save_sae(path, model=MODEL, block=BLOCK, coder="topk", k=2, weights=weights, **options)


@pytest.fixture
def dictionary(tmp_path: Path) -> Any:
    return samples.dictionary(tmp_path / "dictionary")


def centroid(first: int, last: int) -> np.ndarray:
    mean = samples.atoms().astype(np.float64)[first:last].mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_labels_follow_the_definition(tmp_path: Path, dictionary: Any):
    bad, good = centroid(0, 6), centroid(6, 9)
    decoder = np.stack([bad, good, bad + 0.9 * good, 0.9 * bad + good, -bad, *samples.atoms()])
    sae = sae_of(tmp_path / "sae", decoder * 3)
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    for eta in (-0.5, 0.0, 0.3, 0.6):
        found = {concept.index: concept.label for concept in label_latents(sae, dictionary, eta=eta)}
        for i, row in enumerate(unit):
            near, far = float(row @ bad), float(row @ good)
            expected = "neutral" if max(near, far) < eta else "undesirable" if near > far else "desirable"
            assert found.get(i, "neutral") == expected, (eta, i)
    first = {concept.index: concept for concept in label_latents(sae, dictionary, eta=0.6)}
    assert [first[i].label for i in range(4)] == ["undesirable", "desirable", "undesirable", "desirable"]
    assert first[0].group == "weapons" and "eta 0.6" in first[0].source


def test_names_are_those_of_the_nearest_concepts(tmp_path: Path, dictionary: Any):
    sae = sae_of(tmp_path / "sae", samples.atoms())
    table = {concept.index: concept for concept in label_latents(sae, dictionary, eta=0.9)}
    assert table[15].name == "concept 15" and table[15].label == "neutral"
    nearest = {c.index: c for c in label_latents(sae, dictionary, eta=0.9, rule="nearest")}
    assert [nearest[i].label for i in (0, 5, 6, 8, 9)] == ["undesirable"] * 2 + ["desirable"] * 2 + [
        "neutral"
    ]
    # A direction that resembles no concept gets no name.
    odd = np.random.default_rng(4).standard_normal((300, samples.DIM))
    far = (odd / np.linalg.norm(odd, axis=1, keepdims=True) @ samples.atoms().T).max(axis=1)
    named = {concept.index for concept in label_latents(sae_of(tmp_path / "odd", odd), dictionary, eta=0.99)}
    assert named == set(np.flatnonzero(far >= 0.3).tolist()) and 0 < len(named) < 300


def test_counts_are_those_of_the_labels(tmp_path: Path, dictionary: Any):
    sae = sae_of(tmp_path / "sae", samples.atoms())
    etas = [-1.0, 0.0, 0.2, 0.4, 0.6, 1.0]
    for row in count_labels(sae, dictionary, etas):
        labels = [concept.label for concept in label_latents(sae, dictionary, eta=row["eta"])]
        assert row["undesirable"] == labels.count("undesirable")
        assert row["desirable"] == labels.count("desirable")
    for row in count_labels(sae, dictionary, etas, rule="nearest"):
        labels = [c.label for c in label_latents(sae, dictionary, eta=row["eta"], rule="nearest")]
        assert row["undesirable"] == labels.count("undesirable") > 0 or row["eta"] > 0.9
    with pytest.raises(DacoError, match="eta is a cosine"):
        count_labels(sae, dictionary, [0.1, 2])
    cosines = centroid_cosines(sae, dictionary)
    assert cosines["undesirable"] == pytest.approx(samples.atoms() @ centroid(0, 6), abs=1e-6)


def test_many_latents_are_labelled_a_chunk_at_a_time(
    tmp_path: Path, dictionary: Any, monkeypatch: pytest.MonkeyPatch
):
    sae = sae_of(tmp_path / "sae", samples.atoms())
    whole = [label_latents(sae, dictionary, eta=0.2, rule=rule) for rule in ("centroid", "nearest")]
    counts = count_labels(sae, dictionary, [0.2], rule="nearest")
    monkeypatch.setattr("daco_rt.sae.annotate._CHUNK", 7)
    assert [label_latents(sae, dictionary, eta=0.2, rule=rule) for rule in ("centroid", "nearest")] == whole
    assert count_labels(sae, dictionary, [0.2], rule="nearest") == counts


def test_annotating_keeps_weights_and_recipe(tmp_path: Path, dictionary: Any):
    sae = sae_of(tmp_path / "sae", samples.atoms(), recipe={"training": {"k": 2}})
    made = annotate_sae(sae, dictionary, tmp_path / "labelled", eta=0.3)
    file = "sae_weights.safetensors"
    assert (made.path / file).read_bytes() == (sae.path / file).read_bytes()
    recipe = json.loads((made.path / "manifest.json").read_bytes())["recipe"]
    labels = [concept.label for concept in made.annotation]
    assert recipe["training"] == {"k": 2}
    assert recipe["annotation"] == {
        "rule": "centroid", "eta": 0.3, "dictionary": "dictionary",
        "undesirable": labels.count("undesirable"), "desirable": labels.count("desirable"),
    }  # fmt: skip
    # In place, too: the weights are read before the folder is replaced.
    again = annotate_sae(load_sae(made.path), dictionary, made.path, eta=0.5, overwrite=True)
    assert (again.encoder == sae.encoder).all() and len(again.annotation) != 0


def test_a_folder_of_saelens_is_folded_when_it_must_be(tmp_path: Path, dictionary: Any):
    sae = sae_of(tmp_path / "ours", samples.atoms() * 2)
    plain = tmp_path / "theirs"
    plain.mkdir()
    config = json.loads((sae.path / "cfg.json").read_bytes()) | {"rescale_acts_by_decoder_norm": True}
    (plain / "cfg.json").write_text(json.dumps(config))
    (plain / "sae_weights.safetensors").write_bytes((sae.path / "sae_weights.safetensors").read_bytes())
    theirs = load_sae(plain)
    made = annotate_sae(theirs, dictionary, tmp_path / "labelled", eta=0.3)
    for name in ("encoder", "enc_bias", "decoder", "decoder_bias"):
        assert np.allclose(getattr(made, name), getattr(theirs, name), rtol=1e-5, atol=1e-6), name
    assert made.model is not None and made.model.matches(MODEL)


def test_what_does_not_fit_is_refused(tmp_path: Path, dictionary: Any):
    sae = sae_of(tmp_path / "sae", samples.atoms())
    with pytest.raises(DacoError, match="eta is a cosine"):
        label_latents(sae, dictionary, eta=2)
    with pytest.raises(DacoError, match="rule must be"):
        label_latents(sae, dictionary, eta=0.1, rule="other")  # type: ignore[arg-type]
    other = samples.dictionary(tmp_path / "other", dataclasses.replace(MODEL, samples=(9.0, 9.0)))
    with pytest.raises(ArtifactError, match="does not fit SAE"):
        label_latents(sae, other, eta=0.1)
    with pytest.raises(ArtifactError, match="has no block 5"):
        label_latents(dataclasses.replace(sae, block=5), dictionary, eta=0.1)
    neutral = dataclasses.replace(
        dictionary, concepts=tuple(dataclasses.replace(c, label="neutral") for c in dictionary.concepts)
    )
    with pytest.raises(ArtifactError, match="no labelled concept"):
        label_latents(sae, neutral, eta=0.1)


# ---- the sweep

Table = tuple[Concept, ...]


def safety(table: Table, gamma: float) -> float:
    return sum(concept.label == "undesirable" for concept in table) + gamma


def capability(table: Table, gamma: float) -> float:
    return 10 - 0.1 * sum(concept.label != "neutral" for concept in table) - 4 * gamma


def sweep(tmp_path: Path, dictionary: Any, **changes: Any) -> list[SweepPoint]:
    path = tmp_path / "sae"
    sae = load_sae(path) if path.exists() else sae_of(path, samples.atoms())
    options = {"etas": [0.2, 0.5], "gammas": [0.0, 0.1, 0.5], "safety": safety, "capability": capability}
    return sweep_policies(sae, dictionary, **{**options, **changes})


def test_every_pair_is_scored_after_the_unsteered_model(tmp_path: Path, dictionary: Any):
    points = sweep(tmp_path, dictionary)
    assert [(point.eta, point.gamma) for point in points] == [
        (None, 0.0), (0.2, 0.0), (0.2, 0.1), (0.2, 0.5), (0.5, 0.0), (0.5, 0.1), (0.5, 0.5),
    ]  # fmt: skip
    free = points[0]
    assert (free.safety, free.capability, free.undesirable, free.desirable) == (0, 10, 0, 0)
    table = label_latents(load_sae(tmp_path / "sae"), dictionary, eta=0.2)
    assert points[2].safety == pytest.approx(safety(table, 0.1))


def test_choice_is_the_safest_that_stays_capable():
    def point(eta: float | None, gamma: float, safety: float, capability: float) -> SweepPoint:
        return SweepPoint(eta, gamma, 1, 1, safety, capability)

    free = point(None, 0, 0.1, 1.0)
    points = [free, point(0.1, 0, 0.9, 0.5), point(0.2, 0.1, 0.7, 0.96), point(0.2, 0, 0.7, 0.96),
              point(0.3, 0, 0.6, 1.1)]  # fmt: skip
    assert choose_point(points) == points[3]
    assert choose_point(points, keep_capability=0.4) == points[1]
    assert choose_point(points, keep_capability=1.0) == points[4]
    assert choose_point([free, points[1]]) == free
    assert pareto_front(points) == [points[1], points[2], points[4]]
    with pytest.raises(DacoError, match="no unsteered point"):
        choose_point(points[1:])


def test_a_stopped_sweep_goes_on(tmp_path: Path, dictionary: Any):
    results, calls = tmp_path / "sweep.jsonl", []

    def dying(table: Table, gamma: float) -> float:
        calls.append(gamma)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return safety(table, gamma)

    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, dictionary, results=results, safety=dying)
    points = sweep(tmp_path, dictionary, results=results, safety=dying)
    assert len(calls) == 4 + 4 and points == sweep(tmp_path, dictionary)
    with pytest.raises(ArtifactError, match="is a sweep with another rule"):
        sweep(tmp_path, dictionary, results=results, rule="nearest")
    with pytest.raises(ArtifactError, match="is a sweep with another scored_by"):
        sweep(tmp_path, dictionary, results=results, scored_by={"gain": -1})
    # Weights that were trained again under the same name are other weights.
    sae_of(tmp_path / "again" / "sae", samples.atoms() + 0.01)
    with pytest.raises(ArtifactError, match="is a sweep with another weights"):
        sweep(tmp_path / "again", dictionary, results=results)
    results.write_text("nonsense")
    with pytest.raises(ArtifactError, match="is no sweep"):
        sweep(tmp_path, dictionary, results=results)


def test_bad_scores_are_named(tmp_path: Path, dictionary: Any):
    with pytest.raises(DacoError, match=r"capability score at eta None, gamma 0\.0 is nan"):
        sweep(tmp_path, dictionary, capability=lambda table, gamma: float("nan"))
    with pytest.raises(DacoError, match="sweep is empty"):
        sweep(tmp_path, dictionary, etas=[])


def test_figure_is_drawn(tmp_path: Path, dictionary: Any):
    pytest.importorskip("matplotlib")
    from daco_rt.sae.figure import draw_sweep

    points = sweep(tmp_path, dictionary)
    drawn = draw_sweep(points, tmp_path / "sweep.svg", title="a test")
    text = drawn.read_text()
    assert text.startswith("<?xml") and len(text) > 5000
    with pytest.raises(DacoError, match=r"use \.png, \.svg"):
        draw_sweep(points, tmp_path / "sweep.nonsense")
