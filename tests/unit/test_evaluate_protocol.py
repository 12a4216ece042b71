"""The choice among trials, corrected comparisons and intervals over seeds, on numbers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from daco_rt.errors import ArtifactError
from daco_rt.evaluate.choosing import Trial, choose, difference, read_chosen, run_on_test
from daco_rt.evaluate.methods import Method
from daco_rt.evaluate.metrics import Estimate, holm, over_seeds
from daco_rt.evaluate.protocol import Constraint, Protocol, Rate

OURS = Method("ours", "omp", (0.1, 0.2, 0.3))
METHODS = {
    "none": Method("none", "none"),
    "prompt": Method("prompt", "system_prompt"),
    "control": Method("control", "random", OURS.strengths, {"seeds": [0, 1]}, controls=OURS),
    "ours": OURS,
    "other": Method("other", "actadd", (1.0, 2.0, 4.0)),
}
GOAL = Rate("words", "harm")


def protocol(better="lower", budgets=(0.03, 0.1)) -> Protocol:
    return Protocol(budgets, "benign", GOAL, better)


def trial(variant, criterion, kl, broken=()) -> Trial:
    method, _, strength = variant.partition("@")
    exact = [Estimate(value, value, value, 10) for value in (criterion, kl)]
    return Trial(variant, method, float(strength) if strength else None, *exact, broken=broken)


TRIALS = [
    trial("none", 0.9, 0.0),
    trial("prompt", 0.5, 0.08),
    trial("control@0.1", 0.0, 0.0),
    trial("control@0.2", 0.0, 0.0),
    trial("control@0.3", 0.0, 0.0),
    trial("ours@0.1", 0.1, 0.09),
    trial("ours@0.2", 0.4, 0.02),
    trial("ours@0.3", 0.4, 0.01),
    trial("other@1", 0.7, 0.05),
    trial("other@2", math.nan, 0.06),
    trial("other@4", 0.0, 0.05, ("benign, words: refused ≤ 0.1",)),
]


def test_the_best_within_a_budget_and_among_equals_the_gentler():
    found = choose(protocol(), METHODS, TRIALS)
    # The control does not choose for itself: it is at the strength of what it controls.
    assert found[0.03] == {"none": "none", "control": "control@0.3", "ours": "ours@0.3"}
    assert found[0.1] == {
        "none": "none", "prompt": "prompt", "control": "control@0.1", "ours": "ours@0.1", "other": "other@1"
    }  # fmt: skip
    assert choose(protocol("higher"), METHODS, TRIALS)[0.1]["ours"] == "ours@0.3"
    assert run_on_test(METHODS, {0.03: found[0.03]}) == {"none", "prompt", "control@0.3", "ours@0.3"}


def test_a_constraint_holds_at_its_bound_and_never_for_what_was_not_told():
    least, most = Constraint(GOAL, at_least=0.95), Constraint(GOAL, at_most=0.05)
    assert least.holds(0.95) and not least.holds(0.949) and most.holds(0.05) and not most.holds(0.06)
    assert not least.holds(math.nan) and not most.holds(math.nan)


def test_choices_differ_by_name():
    old = {"chosen": {"0.1": {"a": "a@1"}}, "protocol": 1, "packs": {"a": "x"}, "development_sha256": "1"}
    assert difference(old, dict(old)) == ""
    assert difference(old, old | {"chosen": {"0.1": {}}}) == "a at 0.1: a@1 then, none now"
    assert difference(old, old | {"chosen": {"0.1": {"a": "a@1"}, "1": {}}}) == "budget 1: none then"
    assert "another pack" in difference(old, old | {"packs": {"a": "y"}})
    assert "development answers" in difference(old, old | {"development_sha256": "2"})


def test_a_damaged_record_is_no_absent_one(tmp_path):
    assert read_chosen(tmp_path / "chosen.json") is None
    (tmp_path / "chosen.json").write_text('{"format": 2, "chosen": {}}')
    with pytest.raises(ArtifactError, match="no record of a choice"):
        read_chosen(tmp_path / "chosen.json")


def test_holm_steps_down():
    # 4 · .01, 3 · .02, 2 · .03, 1 · .04, never below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_intervals_over_seeds_are_students():
    # Quantiles of tables, at 97.5 %.
    for values, quantile in (([0.0, 1.0], 12.7062), ([0.1, 0.2, 0.3], 4.3027), (list(range(11)), 2.2281)):
        found = over_seeds(values)
        half = quantile * np.std(values, ddof=1) / math.sqrt(len(values))
        assert found.high - found.value == pytest.approx(half, rel=1e-4) and found.n == len(values)
        assert found.value - found.low == pytest.approx(half, rel=1e-4)
    assert over_seeds([0.5]).value == 0.5 and math.isnan(over_seeds([0.5]).low)


def test_a_method_keeps_its_recipe_and_draws():
    control = METHODS["control"]
    assert control.draws == (0, 1) and OURS.draws == (None,)
    assert control.recipe == ["random", {"seeds": [0, 1]}, ["omp", {}]]
