"""Coherence, signal, neighbours and groups against brute force; the report and its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from means_samples import make_means

from daco_rt.artifacts import Concept, ConceptDictionary
from daco_rt.cli import main
from daco_rt.dictionary import build_dictionary, diagnose
from daco_rt.dictionary.diagnostics import (
    coherence,
    group_cosines,
    group_map,
    labelled_groups,
    nearest,
    own_group_share,
    signal,
)
from daco_rt.dictionary.identification import Identification
from daco_rt.errors import ArtifactError, DacoError


def unit(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_coherence_counts_every_pair_once(rows: int) -> None:
    atoms = np.random.default_rng(1).standard_normal((65, 12))
    cosines = (unit(atoms) @ unit(atoms).T)[np.triu_indices(65, 1)]
    found = coherence(3 * atoms, rows=rows, bins=50)
    assert found.counts.sum() == 65 * 64 / 2
    counts, edges = np.histogram(np.abs(cosines), 50, (0, 1))
    # A pair on the edge of a bin may fall to either side.
    assert np.abs(found.counts - counts).sum() <= 2
    assert found.mean == pytest.approx(np.abs(cosines).mean(), rel=1e-5)
    assert found.mean_signed == pytest.approx(cosines.mean(), abs=1e-6)
    assert found.maximum == pytest.approx(np.abs(cosines).max(), rel=1e-5)
    i, j = found.pair
    assert i < j and abs((unit(atoms) @ unit(atoms).T)[i, j]) == pytest.approx(found.maximum, rel=1e-5)
    for share in (0.1, 0.5, 0.9):
        low, high = found.quantile(share) - edges[1], found.quantile(share)
        assert low - 1e-6 <= np.quantile(np.abs(cosines), share) <= high + edges[1]


def test_coherence_of_twins_and_opposites() -> None:
    atoms = np.array([[1, 0, 0], [0, 1, 0], [0, -2, 0]], np.float16)
    found = coherence(atoms)
    assert found.pair == (1, 2) and found.maximum == 1.0 and found.counts[-1] == 1 and found.counts[0] == 2
    assert found.mean_signed == pytest.approx(-1 / 3)
    with pytest.raises(DacoError, match="needs two atoms, got 1"):
        coherence(atoms[:1])
    with pytest.raises(DacoError, match="atom 1 is zero or not finite"):
        coherence(np.array([[1.0, 0], [0, 0]]))


def test_signal_is_length_over_standard_error(tmp_path: Path) -> None:
    positive = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    counts = {1: np.array([5, 2, 1, 10])}
    means = make_means(tmp_path, {1: positive}, counts=counts, spread=8.0)
    found = signal(means, 1, np.array([0, 1, 2, 3]), np.array([2.0, 2.0, 2.0, 3.0]))
    np.testing.assert_allclose(found.spread, np.full(4, 8**0.5), rtol=1e-6)
    np.testing.assert_allclose(found.errors[[0, 1, 3]], np.sqrt([2.0, 8.0, 8 / 9]), rtol=1e-6)
    np.testing.assert_allclose(found.ratio[[0, 3]], [2**0.5, 3 / np.sqrt(8 / 9)], rtol=1e-6)
    assert np.isnan(found.errors[2]) and np.isfinite(found.to_dict()["ratio"]["0.5"])
    part = signal(means, 1, np.array([3]), np.array([3.0]))
    np.testing.assert_array_equal(part.ratio, found.ratio[3:])


def test_neighbours_are_ranked_by_cosine_and_leave_out_themselves() -> None:
    atoms = np.array([[1, 0], [1, 0.2], [0, 1], [-1, 0], [2, 0.9]], np.float32)
    concepts = [Concept(i, name) for i, name in enumerate("abcde")]
    found = nearest(atoms, concepts, 0, count=3)
    assert [each.concept.name for each in found] == ["b", "e", "c"]
    assert found[0].cosine == pytest.approx(1 / np.hypot(1, 0.2)) and found[2].cosine == pytest.approx(0)
    assert len(nearest(atoms, concepts, 0, count=99)) == 4
    assert [each.concept.name for each in nearest(atoms, concepts[2:], 0, count=1)] == ["e"]
    with pytest.raises(DacoError, match="at least 1, got 0"):
        nearest(atoms, concepts, 0, count=0)


def planted(groups: int = 4, members: int = 9, dim: int = 30) -> tuple[np.ndarray, tuple[Concept, ...]]:
    """Atoms around one centre a group, and as many of no group."""
    rng = np.random.default_rng(3)
    centres = 2 * unit(rng.standard_normal((groups, dim)))
    rows, concepts = [], []
    for i in range(2 * groups * members):
        group = i % groups if i < groups * members else None
        rows.append(rng.standard_normal(dim) / dim**0.5 + (0 if group is None else centres[group]))
        label = "neutral" if group is None else "undesirable"
        name = f"c{i}" if i else "dagger"
        concepts.append(Concept(i, name, label, "" if group is None else f"g{group}", gloss=f"gloss {i}"))
    return np.array(rows, np.float32), tuple(concepts)


def test_groups_lie_apart_where_they_were_planted_apart() -> None:
    atoms, concepts = planted()
    groups = labelled_groups(concepts)
    assert list(groups) == ["g0", "g1", "g2", "g3"] and [len(rows) for rows in groups.values()] == [9] * 4
    assert labelled_groups(concepts, minimum=10) == {} == labelled_groups(concepts, label="desirable")
    cosines = group_cosines(atoms, groups)
    exact = unit(atoms[groups["g1"]]) @ unit(atoms[groups["g2"]]).T
    assert cosines[1, 2] == pytest.approx(exact.mean(), abs=1e-5)
    inside = (unit(atoms[groups["g1"]]) @ unit(atoms[groups["g1"]]).T)[np.triu_indices(9, 1)]
    assert cosines[1, 1] == pytest.approx(inside.mean(), abs=1e-5)
    assert own_group_share(atoms, groups) == 1.0
    mixed = {"a": np.arange(36, 54), "b": np.arange(54, 72)}
    # Left out of its own mean, an atom of no group is no nearer to it than to another.
    assert own_group_share(atoms, mixed) < 0.75
    places, shares = group_map(atoms, groups)
    assert 0.6 < sum(shares) <= 1 and shares[0] >= shares[1]
    spread = np.mean([places[name].std(axis=0).max() for name in groups])
    middles = np.array([places[name].mean(axis=0) for name in groups])
    assert middles.std(axis=0).min() > 2 * spread
    with pytest.raises(DacoError, match="three groups of concepts, got 2"):
        group_map(atoms, {name: groups[name] for name in ("g0", "g1")})


@pytest.fixture
def built(tmp_path: Path) -> tuple[Any, ConceptDictionary]:
    atoms, concepts = planted()
    rng = np.random.default_rng(4)
    means = make_means(
        tmp_path / "m", {b: atoms + 0.1 * rng.standard_normal(atoms.shape) for b in (2, 5, 7)},
        concepts=concepts, spread=0.5,
    )  # fmt: skip
    return means, build_dictionary(means, tmp_path / "d", progress=False)


def test_the_report_is_plain_json_and_draws_every_figure(
    built: tuple[Any, ConceptDictionary], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from daco_rt.dictionary.figures import write_figures

    means, dictionary = built
    ranks = {block: np.array([1, 2, 9, 0, 1, 30], np.int32) for block in (2, 5, 7)}
    ranks[5][1] = 1
    found = Identification(
        dictionary.size, dictionary.concepts[:6], ("sentence",) * 3 + ("definition asked",) * 3,
        {"ordinary": ranks, "readings": ranks}, {},
    )  # fmt: skip
    report = json.loads(json.dumps(diagnose(dictionary, means, identification=found, progress=False)))
    assert report["block"] == 5 and report["blocks"] == [2, 5, 7]
    exact = coherence(dictionary.atoms(7))
    assert report["coherence"]["7"]["mean"] == pytest.approx(exact.mean, abs=1e-5)
    assert sum(report["coherence"]["7"]["histogram"]) == 72 * 71 / 2
    assert set(report["coherence"]["7"]["pair"]) <= {concept.name for concept in dictionary.concepts}
    assert report["signal"]["2"]["spread"]["0.5"] == pytest.approx(0.5**0.5, abs=1e-4)
    assert [row["group"] for row in report["neighbours"]["dagger"]] == ["g0"] * 5
    assert report["groups"]["sizes"] == [9, 9, 9, 9]
    drawn = write_figures(report, tmp_path / "figures", kind="svg")
    assert [path.stem for path in drawn] == ["coherence", "groups", "map", "signal", "identification"]
    text = (tmp_path / "figures" / "identification.svg").read_text()
    # 2 of 3 sentences are right at block 5; of the definitions one of two that could be read.
    assert "at best 67 %, block 5" in text and "at best 50 %, block 7" in text
    assert "Half of all pairs: |cos| below" in (tmp_path / "figures" / "coherence.svg").read_text()
    few = write_figures({**report, "signal": None, "groups": None, "identification": None}, tmp_path / "few")
    assert [path.name for path in few] == ["coherence.png"]
    with pytest.raises(DacoError, match=r"'jpg' is unknown; use \.png"):
        write_figures(report, tmp_path / "few", kind="jpg")


def test_a_report_refuses_other_means_and_blocks(
    built: tuple[Any, ConceptDictionary], tmp_path: Path
) -> None:
    means, dictionary = built
    with pytest.raises(ArtifactError, match="no block 3; available: 2, 5, 7"):
        diagnose(dictionary, means, block=3, progress=False)
    atoms, _concepts = planted()
    other = make_means(tmp_path / "o", dict.fromkeys((2, 5, 7), atoms[1:]), concepts=None)
    with pytest.raises(DacoError, match="was not made from"):
        diagnose(dictionary, other, progress=False)
    assert diagnose(dictionary, progress=False)["signal"] is None


def test_inspect_lists_neighbours(built: tuple[Any, ConceptDictionary], capsys: Any) -> None:
    _, dictionary = built
    path = str(dictionary.path)
    assert main(["inspect", path, "--nearest", "dagger", "--block", "7", "--count", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = nearest(dictionary.atoms(7), dictionary.concepts, 0, count=3)
    assert found["block"] == 7 and found["concept"] == "dagger"
    assert [row["name"] for row in found["nearest"]] == [each.concept.name for each in wanted]
    assert {row["group"] for row in found["nearest"]} == {"g0"}
    assert main(["inspect", path, "--nearest", "dagger"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["cosine", "concept", "label", "group"] and len(lines) == 11
    for arguments, message in (
        (["--nearest", "dager"], "no concept 'dager'; did you mean 'dagger'? (72 in all)"),
        (["--nearest", "dagger", "--block", "3"], "no block 3; available: 2, 5, 7"),
        (["--nearest", "dagger", "--count", "0"], "at least 1, got 0"),
        (["--block", "7"], "--block belongs to --nearest"),
    ):
        assert main(["inspect", path, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_inspect_reads_the_atoms_of_packs_and_saes(
    built: tuple[Any, ConceptDictionary], tmp_path: Path, capsys: Any
) -> None:
    from daco_rt.artifacts import save_sae
    from daco_rt.steering import PolicySpec, compile_pursuit_pack

    _, dictionary = built
    wanted = [each.concept.name for each in nearest(dictionary.atoms(5), dictionary.concepts, 0, count=4)]
    pack = compile_pursuit_pack(
        dictionary, tmp_path / "pack", policies=[PolicySpec("p", groups=("g0",))], k=4, dtype="int8"
    )
    assert main(["inspect", str(pack.path), "--nearest", "dagger", "--count", "4", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["nearest"]] == wanted
    weights = {
        "W_enc": dictionary.atoms(5).T.astype(np.float32),
        "W_dec": dictionary.atoms(5).astype(np.float32),
        "b_enc": np.zeros(dictionary.size, np.float32),
        "b_dec": np.zeros(dictionary.dim, np.float32),
    }
    for name, annotation in (("bare", ()), ("labelled", dictionary.concepts)):
        save_sae(
            tmp_path / name, model=dictionary.model, block=5, coder="relu", weights=weights,
            annotation=annotation,
        )  # fmt: skip
    assert main(["inspect", str(tmp_path / "labelled"), "--nearest", "dagger", "--count", "4", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["nearest"]] == wanted
    assert main(["inspect", str(tmp_path / "bare"), "--nearest", "dagger"]) == 2
    assert "names none of its atoms; label it first: daco-rt annotate" in capsys.readouterr().err
