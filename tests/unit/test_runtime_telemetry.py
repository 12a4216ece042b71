"""Telemetry: which codes were edited, by hand-made operands, and what reaches JSON and the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from daco_rt.artifacts import Concept, ModelIdentity, Policy, save_pack
from daco_rt.errors import PolicyError
from daco_rt.runtime.policies import Chosen, choose_policy
from daco_rt.runtime.telemetry import AnswerTelemetry, BlockRows, ConceptBook, telemetry_table

NAN = float("nan")


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> ConceptBook:
    """Two blocks, four atoms of norms 1, 2, 1, 1; slot 2 has a deadband of 0.5 and is 0 at block 5."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(4, 8)).astype(np.float32)
    atoms *= np.array([1, 2, 1, 1], np.float32)[:, None] / np.linalg.norm(atoms, axis=1, keepdims=True)
    gain = np.ones((4, 4), np.float32)
    gain[2] = [0, 0, 1.5, 1]
    boost = np.zeros((4, 4), np.float32)
    boost[2, 3] = 0.2
    undesirable = np.zeros((4, 4), bool)
    undesirable[1:, :2] = True
    limits = np.zeros((4, 4), np.float32)
    limits[2, 0] = 0.5
    operands = {
        "enc": atoms.copy(),
        "enc_bias": np.zeros(4, np.float32),
        "dec": atoms,
        "gain": gain,
        "boost": boost,
        "undesirable": undesirable,
        "shift": np.zeros((4, 8), np.float32),
        "limits": limits,
    }
    pack = save_pack(
        tmp_path_factory.mktemp("telemetry") / "pack",
        model=ModelIdentity(8, 6, 16, 2, 1, "internvl", (0.5,) * 64),
        op="sae",
        coder="topk",
        k=4,
        k_out=4,
        operands={2: operands, 5: operands},
        policies=[Policy("default", 2, "generated", (2,)), Policy("both", 3, "all", (2, 5))],
        default_policy="default",
        median_norm={2: 1.0, 5: 1.0},
        concepts=[
            Concept(0, "dagger", "undesirable"),
            Concept(1, "[poison]", "undesirable"),
            Concept(2, "bread", "desirable"),
        ],
    )
    return ConceptBook(pack)


def _rows(values: list[list[float]], doses: list[list[float]]) -> BlockRows:
    """Support in the order of the atoms; a zero stands for an atom that is not active."""
    value = np.array(values, np.float32)
    index = np.where(value != 0, np.arange(value.shape[1]), -1).astype(np.int32)
    return BlockRows(np.array(doses, np.float32), index, value)


@pytest.fixture
def telemetry(book: ConceptBook) -> AnswerTelemetry:
    """Prompt of three tokens, then two decoded ones, under the default policy."""
    found = AnswerTelemetry("default", 2, 3, book)
    values = [[0.9, 0.3, 0.6, 0.7], [0.4, 0.2, 0.5, 0.0], [0.8, 0.0, 0.0, 0.0]]
    doses = [[0.3, 0.2], [0.2, 0.0], [NAN, NAN]]
    for row in range(3):
        report = _rows(values[row : row + 1], doses[row : row + 1])
        found.record(np.array([0]), 2 + row, np.array([70 + row]), {2: report, 5: report})
    return found


def test_an_action_needs_a_gain_or_a_boost_above_the_deadband(telemetry: AnswerTelemetry) -> None:
    first, second, _ = telemetry.active(2)
    assert [(c.name, c.action) for c in first] == [
        ("dagger", "removed"),
        ("[poison]", "removed"),  # code 0.3 at norm 2 is 0.6: above the deadband of 0.5
        ("bread", "amplified"),
        ("atom 3", "boosted"),
    ]
    assert [c.strength for c in first] == pytest.approx([0.9, 0.6, 0.6, 0.7])
    # 0.4 and 0.4 are below the deadband; 0.5 is not above it.
    assert [c.action for c in second] == ["", "", ""]


def test_a_block_outside_the_policy_is_not_reported(telemetry: AnswerTelemetry) -> None:
    assert telemetry.blocks == (2,)
    assert set(telemetry.summary()["blocks"]) == {"2"}


def test_the_summary_counts_rows_and_leaves_out_what_is_not_finite(telemetry: AnswerTelemetry) -> None:
    summary = telemetry.summary()
    assert summary["rows"] == 3
    block = summary["blocks"]["2"]
    assert block["removed_dose"] == {"mean": pytest.approx(0.25), "max": pytest.approx(0.3)}
    assert (block["edited_rows"], block["not_finite_rows"]) == (1, 1)
    assert [(c["name"], c["rows"]) for c in summary["removed"]] == [("dagger", 2), ("[poison]", 1)]
    assert (summary["active"][0]["name"], summary["active"][0]["rows"]) == ("dagger", 3)
    assert telemetry.sentence() == "removed: dagger ×2, [poison] ×1"
    assert telemetry.sentence(limit=1) == "removed: dagger ×2, and 1 more"


def test_json_is_strict_and_says_which_token_a_row_made(telemetry: AnswerTelemetry) -> None:
    document = json.loads(json.dumps(telemetry.to_json(lambda i: f"<{i}>"), allow_nan=False))
    assert [t["produced"] for t in document["tokens"]] == [0, 1, 2]
    assert [t["position"] for t in document["tokens"]] == [2, 3, 4]
    assert document["tokens"][2]["blocks"]["2"]["removed_dose"] is None
    assert document["tokens"][0]["token"] == "<70>"
    assert document["tokens"][0]["blocks"]["2"]["concepts"][0]["action"] == "removed"


def test_the_table_shows_names_as_they_are(telemetry: AnswerTelemetry) -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(telemetry_table(telemetry, lambda i: f"[{i}]\n"))
    text = console.export_text()
    assert "dagger, [poison]" in text and "[70]\\n" in text and "bread" in text
    assert "nan" in text


def test_one_block_without_support_still_reports_doses(book: ConceptBook) -> None:
    found = AnswerTelemetry("both", 3, 1, book)
    doses = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)
    found.record(np.array([1]), 0, np.array([4, 5]), {2: BlockRows(doses, None, None)})
    assert found.active(2) == [[]]
    assert found.positions == [1] and found.token_ids == [5]
    assert found.summary()["blocks"]["2"]["applied_dose"]["max"] == pytest.approx(0.4)
    assert found.sentence() == "policy both: 1 tokens covered, nothing removed"


def test_policies_are_chosen_by_name_and_never_guessed(book: ConceptBook, tmp_path: Path) -> None:
    assert choose_policy(book.pack, None) == Chosen("default", 2, "generated")
    assert choose_policy(book.pack, "off").slot == 0
    assert choose_policy(book.pack, "observe") == Chosen("observe", 1, "all")
    with pytest.raises(PolicyError, match="did you mean 'default'"):
        choose_policy(book.pack, "defalt")
    assert choose_policy(None, None).slot == 0
    with pytest.raises(PolicyError, match="without a pack"):
        choose_policy(None, "default")


def test_norms_are_read_once(book: ConceptBook, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = np.linalg.norm
    fresh = ConceptBook(book.pack)
    monkeypatch.setattr(
        "daco_rt.runtime.telemetry.np.linalg", SimpleNamespace(norm=lambda a: calls.append(1) or real(a))
    )
    indices, values = np.array([0, 1, -1]), np.array([1.0, 1.0, 0.0])
    for _ in range(3):
        assert [c.strength for c in fresh.active(2, 2, indices, values)] == pytest.approx([1, 2])
    assert len(calls) == 2
