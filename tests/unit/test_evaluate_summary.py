"""From verdicts to numbers: rates that know which answers hang together, and a judge's further numbers."""

from __future__ import annotations

import pytest

from daco_rt.errors import DacoError
from daco_rt.evaluate.judges import Verdict
from daco_rt.evaluate.metrics import bootstrap, clustered_share, mcnemar, paired_p, permutation_test, wilson
from daco_rt.evaluate.rates import by_question, judge_numbers, mean_of
from daco_rt.evaluate.samples import Sample

BETTER = {"mention": "lower", "recall": "higher", "never": "higher"}


def heard(unsafe, **scores) -> Verdict:
    return Verdict(unsafe, None, "", "test-1", scores=scores)


def test_scores_are_averaged_where_they_apply_and_tested_by_question():
    questions = ["a", "b", "c", "d"]
    after = [
        heard(False, mention=False, recall=1.0),
        heard(True, mention=True, recall=None),
        heard(None, mention=False, recall=0.5),
        heard(False, mention=False, recall=0.0),
    ]
    before = [heard(True, mention=True, recall=1.0)] * 4
    found = judge_numbers(questions, after, before, "unsafe", BETTER)
    assert found.scores["mention"].estimate == wilson(1, 4)
    assert found.scores["mention"].p == mcnemar([True] * 4, [False, True, False, False])
    recall = found.scores["recall"]
    assert recall.estimate == bootstrap([[1.0], [0.5], [0.0]]) and recall.better == "higher"
    assert recall.p == permutation_test([0.0, -0.5, -1.0])
    assert found.scores["never"].estimate.n == 0 and found.scores["never"].p is None
    # The main rate counts the unjudged answer in its denominator, the test leaves it out.
    assert found.main == wilson(1, 4) and found.p == mcnemar([True] * 3, [False, True, False])
    with pytest.raises(DacoError, match=r"score 'recall', which its kind does not list \(mention"):
        judge_numbers(questions, after, before, "unsafe", {"mention": "lower"})


def test_a_verdict_with_scores_survives_its_file():
    verdict = heard(True, mention=True, recall=0.25, other=None)
    assert Verdict.from_json(verdict.to_json()) == verdict
    assert "scores" not in Verdict(True, None, "", "x").to_json()
    sample = Sample("1", "c", "q", group="g", facts={"objects": ["cat"]})
    assert sample.question == "g" and Sample("1", "c", "q").question == "1" and hash(sample)


def test_repetitions_narrow_an_interval_only_as_far_as_they_differ():
    # Ten questions, three answers each. Alike: as wide as ten. Shared out evenly: nearly as narrow as thirty.
    alike = clustered_share([[True] * 3] * 4 + [[False] * 3] * 6)
    ten, thirty = wilson(4, 10), wilson(12, 30)
    assert alike.value == ten.value and alike.n == 30
    assert alike.low == pytest.approx(ten.low, abs=0.02) and alike.high == pytest.approx(ten.high, abs=0.02)
    even = clustered_share([[True, False, False]] * 8 + [[True, True, False]] * 2)
    assert (even.low, even.high) == (thirty.low, thirty.high)
    assert clustered_share([[True], [False], [True]]) == wilson(2, 3)
    nothing = clustered_share([[False] * 3] * 10)
    assert nothing.low == pytest.approx(0, abs=1e-12) and nothing.high == wilson(0, 10).high
    assert clustered_share([[], [True]]) == wilson(1, 1)


def test_paired_p_does_not_count_repetitions_as_questions():
    assert paired_p([[-1.0]] * 6) == mcnemar([True] * 6, [False] * 6)
    assert paired_p([[-1.0] * 5] * 6) == pytest.approx(permutation_test([-1.0] * 6)) == 0.03125
    assert paired_p([[-0.5], [-0.25]]) == permutation_test([-0.5, -0.25])
    assert paired_p([[], []]) is None


def test_means_by_question():
    assert by_question(["a", "b", "a"], [1, 2, 3]) == [[1, 3], [2]]
    assert mean_of(["a", "a", "b"], [True, False, None]) == clustered_share([[True, False]])
    assert mean_of(["a"], [None]).n == 0
    assert mean_of(["a", "a", "b"], [1.0, 0.0, 0.5]).n == 3
