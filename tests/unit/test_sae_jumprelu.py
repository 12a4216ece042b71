"""One threshold a latent in place of a competition: the best one, and an honest account of its cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_samples as samples
from sae_samples import ATOMS, BLOCK, MODEL, quick

from daco_rt.artifacts import Concept, load_sae, save_sae
from daco_rt.errors import ArtifactError
from daco_rt.sae import StoreSource, convert_to_jumprelu, train_sae
from daco_rt.sae.jumprelu import _best_threshold, topk_thresholds


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("world")
    source = StoreSource(samples.store(folder / "store"), BLOCK)
    sae = train_sae(
        source, folder / "sae", model=MODEL, block=BLOCK, training=quick(steps=150),
        dictionary=samples.dictionary(folder / "dictionary"), progress=False,
    )  # fmt: skip
    return source, sae


def codes(sae: Any, rows: np.ndarray) -> np.ndarray:
    before = np.maximum(rows @ sae.encoder.T + sae.enc_bias, 0)
    if sae.threshold is not None:
        return np.where(before > sae.threshold, before, 0)
    return np.where(before >= np.sort(before, axis=1)[:, [-sae.k]], before, 0)


def test_threshold_is_the_best_there_is():
    random = np.random.default_rng(0)
    for _ in range(20):
        values = random.standard_normal(40).astype(np.float32)
        kept = (values > 0) & (values + random.standard_normal(40) > 0.5)
        if not kept.any():
            continue
        energy = np.where(values > 0, values.astype(np.float64) ** 2, 0)

        def cost(
            t: float, values: np.ndarray = values, kept: np.ndarray = kept, e: np.ndarray = energy
        ) -> float:
            return float(e[kept & (values <= t)].sum() + e[~kept & (values > t)].sum())

        found = _best_threshold(values, kept, usual=1.0)
        assert found >= 0
        assert cost(found) == pytest.approx(min(cost(t) for t in [0.0, *np.maximum(values, 0)]))


def test_separable_latents_are_imitated_exactly():
    values = np.array([-1, 0.5, 1.0, 2.0, 3.0], np.float32)
    found = _best_threshold(values, values >= 2, usual=9.0)
    assert 1.0 < found < 2.0
    # One that never wins gets a threshold above all that was seen of it.
    assert _best_threshold(values, values > 99, usual=0.1) == 3.0
    assert _best_threshold(values, values > 99, usual=7.0) == 7.0


def test_converted_codes_and_cost(world: Any, tmp_path: Path):
    source, sae = world
    made, cost = convert_to_jumprelu(sae, source, tmp_path / "jump", rows=500)
    assert (made.coder, made.k, made.threshold.shape) == ("jumprelu", None, (ATOMS,))
    assert (made.encoder == sae.encoder).all() and (made.decoder == sae.decoder).all()
    rows = samples.rows(2000, seed=77)
    before, after = codes(sae, rows), codes(made, rows)
    both = (before > 0) & (after > 0)
    assert np.allclose(before[both], after[both])

    def explained(active: np.ndarray) -> float:
        left = rows - active @ sae.decoder - sae.decoder_bias
        return 1 - (left**2).sum() / ((rows - rows.mean(axis=0)) ** 2).sum()

    assert cost.loss == pytest.approx(explained(before) - explained(after), abs=0.02)
    assert cost.l0_jumprelu == pytest.approx((after > 0).sum(axis=1).mean(), abs=0.3)
    assert cost.loss < 0.1 and 0 <= cost.missed < 0.2 and 0 <= cost.extra < 0.2
    # Without thresholds several times as many codes would be there.
    relu = np.maximum(rows @ sae.encoder.T + sae.enc_bias, 0)
    assert (relu > 0).sum() > 2 * (after > 0).sum()


def test_latents_are_calibrated_alone(world: Any, monkeypatch: Any):
    _, sae = world
    rows = samples.rows(300, seed=3)
    whole = topk_thresholds(sae, rows)
    monkeypatch.setattr("daco_rt.sae.jumprelu._LATENTS", 5)
    parts = topk_thresholds(sae, rows)
    assert np.allclose(whole[0], parts[0], rtol=1e-5) and whole[1] == parts[1]


def test_annotation_and_recipe_go_along(world: Any, tmp_path: Path):
    source, sae = world
    weights = {"W_enc": np.ascontiguousarray(sae.encoder.T), "W_dec": sae.decoder, "b_enc": sae.enc_bias,
               "b_dec": sae.decoder_bias}  # fmt: skip
    labelled = save_sae(
        tmp_path / "labelled", model=MODEL, block=BLOCK, coder="topk", k=3, weights=weights,
        annotation=[Concept(2, "dagger", "undesirable")], recipe={"training": {"k": 3}},
        apply_b_dec_to_input=False,
    )  # fmt: skip
    made, cost = convert_to_jumprelu(labelled, source, tmp_path / "jump", rows=200)
    assert made.annotation == labelled.annotation
    text = (made.path / "manifest.json").read_text()
    assert '"training"' in text and '"ev_jumprelu"' in text and '"converted_from": "labelled"' in text
    assert cost.rows == 100 and load_sae(made.path).threshold is not None


def test_only_topk_is_converted(world: Any, tmp_path: Path):
    source, sae = world
    made, _ = convert_to_jumprelu(sae, source, tmp_path / "jump", rows=100)
    with pytest.raises(ArtifactError, match="only a topk SAE"):
        convert_to_jumprelu(made, source, tmp_path / "again")
