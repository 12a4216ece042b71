"""An evaluation under a protocol: trials on the development part, a frozen choice, the test part once."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from daco_rt.artifacts import load_pack
from daco_rt.cli import main
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.evaluate.choosing import FILE
from daco_rt.evaluate.config import read_config
from daco_rt.evaluate.layouts import write_mm_safetybench
from daco_rt.evaluate.protocol_run import ProtocolRun
from daco_rt.evaluate.reading import COLUMNS
from daco_rt.evaluate.report import write_protocol_report
from daco_rt.evaluate.subject import BundleSubject

CONFIG = {
    "version": 1,
    "model": {"family": "internvl", "checkpoint": "pocket-internvl"},
    "dictionary": "built-in",
    "output": "run",
    "generation": {"max_new_tokens": 4, "batch_size": 4, "threads": 1},
    "split": {"dev": 0.5},
    "benchmarks": {
        "mm": {"kind": "mm_safetybench", "path": "mm", "methods": ["SD_TYPO", "Text_only"], "limit": 6},
        "benign": {"limit": {"dev": 4, "test": 3}},
    },
    "methods": {
        "control": {"kind": "random", "of": "pursuit", "match": "dose", "seeds": [0, 1]},
        "system": {"kind": "system_prompt"},
        "pursuit": {"kind": "omp", "strengths": [0.3, 5.0]},
        "rank-4": {"kind": "projection", "strengths": [0.2, 1.0], "rank": 4, "pool": "span"},
        "rank-8": {"kind": "projection", "strengths": [0.2, 1.0], "rank": 8, "pool": "span"},
    },
    "judges": {"refusal": {}, "lexicon": {}},
    "timing": False,
    "protocol": {
        "budgets": [50.0, 0.00001],
        "criterion": {"judge": "lexicon", "benchmark": "mm", "rate": "named"},
        "constraints": [{"judge": "refusal", "benchmark": "benign", "rate": "refused", "at_most": 1.0}],
        "reference": "pursuit",
    },
}


def write_config(folder: Path, **changes) -> Path:
    file = folder / "evaluate.yaml"
    file.write_text(yaml.safe_dump(CONFIG | changes, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> ProtocolRun:
    """A run through the command line, in two steps."""
    folder = tmp_path_factory.mktemp("protocol")
    write_mm_safetybench(folder / "mm")
    config = str(write_config(folder))
    assert main(["evaluate", config, "--part", "dev", "--json"]) == 0
    assert not (folder / "run" / FILE).exists() and not (folder / "run" / "test").exists()
    assert "trials, no results" in (folder / "run" / "report.md").read_text()
    assert main(["evaluate", config, "--json"]) == 0
    return ProtocolRun(read_config(config))


def with_changes(run: ProtocolRun, tmp_path: Path, **changes) -> ProtocolRun:
    """The same output folder under another configuration, on a copy."""
    shutil.copytree(run.output, tmp_path / "run")
    (tmp_path / "mm").symlink_to(run.config.path.parent / "mm")
    return ProtocolRun(read_config(write_config(tmp_path, **changes)))


def test_the_best_trial_within_each_budget_is_chosen_and_nothing_else_is_tested(finished):
    record = finished.chosen
    trials = {trial["variant"]: trial for trial in record["trials"]}
    assert set(trials) == {cell.variant for cell in finished.development.cells}
    assert not any(name.startswith("control") for name in trials)
    assert list(record["chosen"]) == ["1e-05", "50"]
    for budget, row in record["chosen"].items():
        assert row["none"] == "none"
        for method in ("pursuit", "rank-4", "rank-8"):
            keeps = [
                t for t in trials.values() if t["method"] == method and t["divergence"][0] <= float(budget)
            ]
            best = min(keeps, key=lambda t: (t["criterion"][0], t["divergence"][0]), default=None)
            assert row.get(method) == (None if best is None else best["variant"])
        assert row["control"] == row["pursuit"].replace("pursuit", "control")
    # No code is as strong as the deadband of 5, and every edit of a span costs something.
    assert record["chosen"]["1e-05"]["pursuit"] == "pursuit@5"
    assert "rank-4" not in record["chosen"]["1e-05"] and "system" not in record["chosen"]["1e-05"]
    chosen = {variant for row in record["chosen"].values() for variant in row.values()}
    assert {cell.variant for cell in finished.test.cells} == chosen | {"system"}


def test_the_parts_share_packs_and_no_question(finished):
    for name in ("mm", "benign"):
        dev, test = (e.benchmarks[name].samples for e in (finished.development, finished.test))
        assert not {s.question for s in dev} & {s.question for s in test} and dev and test
        assert (len(dev), len(test)) == ((6, 6) if name == "mm" else (4, 3))
    assert not list(finished.output.glob("*/packs")) and not list(finished.output.glob("*/bundles"))
    for method, checksum in finished.chosen["packs"].items():
        manifest = json.loads((finished.output / "packs" / method / "manifest.json").read_text())
        assert manifest["checksum"] == checksum


def test_the_control_doses_as_what_it_controls(finished):
    notes = json.loads((finished.output / "packs" / "control.notes.json").read_text())
    assert notes["match"] == "dose" and notes["of"] == "pursuit"
    for draw in (0, 1):
        row = notes[f"control@0.3-d{draw}"]
        assert row["dose of undesirable atoms"] > 0.001
        assert row["dose of random atoms"] == pytest.approx(row["dose of undesirable atoms"], rel=1e-6)
    pack = load_pack(finished.output / "packs" / "control")
    one, other = (
        pack.operands(pack.blocks[0])["gain"][pack.policy(f"control@0.3-d{draw}").slot] for draw in (0, 1)
    )
    assert (one != 1).sum() == (other != 1).sum() == row["atoms"] and ((one != 1) != (other != 1)).any()
    assert {cell.draw for cell in finished.test.cells if cell.method == "control"} == {0, 1}


def test_a_second_run_asks_nothing(finished, monkeypatch):
    def refuse(*_):
        raise AssertionError("something was generated again")

    monkeypatch.setattr(BundleSubject, "__init__", refuse)
    before = (finished.output / FILE).read_bytes()
    ProtocolRun(finished.config).run()
    assert (finished.output / FILE).read_bytes() == before


def test_a_judge_may_be_added_after_the_test(finished, tmp_path, monkeypatch):
    strict = {"kind": "refusal", "count_rest_as_unsafe": True}
    run = with_changes(finished, tmp_path, judges=CONFIG["judges"] | {"strict": strict})
    monkeypatch.setattr(BundleSubject, "__init__", None)  # nothing is loaded
    run.run()
    assert run.chosen == finished.chosen
    report = write_protocol_report(run)
    assert all(set(n.judges) == {"refusal", "lexicon", "strict"} for n in report.numbers)


def test_another_choice_after_the_test_is_refused_by_name(finished, tmp_path):
    changed = CONFIG["protocol"] | {"budgets": [50.0]}
    with pytest.raises(ArtifactError, match=r"was run under the choice of 20.*budget 1e-05: none now"):
        with_changes(finished, tmp_path, protocol=changed).run()
    rows = (finished.output / FILE).read_text()
    assert json.loads(rows)["chosen"]["50"]  # the frozen record stays


def test_the_choice_that_was_tested_may_not_be_rewritten_or_lost(finished, tmp_path):
    run = with_changes(finished, tmp_path)
    record = run.chosen
    record["chosen"]["50"]["rank-4"] = (
        "rank-4@0.2" if record["chosen"]["50"]["rank-4"] != "rank-4@0.2" else "x"
    )
    (run.output / FILE).write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="rank-4 at 50: "):
        run.run()
    (run.output / FILE).write_text("{")
    with pytest.raises(ArtifactError, match="is no record of a choice"):
        run.run()
    (run.output / FILE).unlink()
    with pytest.raises(ArtifactError, match=r"there are test answers but no chosen\.json"):
        run.run()


def test_before_the_test_has_begun_a_choice_may_change(finished, tmp_path):
    run = with_changes(finished, tmp_path, protocol=CONFIG["protocol"] | {"budgets": [50.0]})
    shutil.rmtree(run.output / "test")
    run.freeze()
    assert list(run.chosen["chosen"]) == ["50"]


def test_the_report_shows_both_parts(finished):
    page = (finished.output / "report.html").read_text()
    notes = (finished.output / "report.md").read_text()
    record = json.loads((finished.output / "report.json").read_text(), parse_constant=pytest.fail)
    assert {part: run["part"] for part, run in record["runs"].items()} == {"dev": "dev", "test": "test"}
    assert record["runs"]["test"]["config"]["protocol"] == CONFIG["protocol"]
    json.loads((finished.output / FILE).read_text(), parse_constant=pytest.fail)
    for title in (
        "## Protocol", "## Test part at KL ≤ 50", "## Methods compared", "## Over repetitions",
        "## Fronts on the development part", "## Trials on the development part", "## mm, test part",
        "## mm, development part", "## Examples",
    ):  # fmt: skip
        assert title in notes, title
    assert "| system † |" in notes and "exploration" not in notes
    assert record["chosen"]["chosen"] == finished.chosen["chosen"]
    pairs = {(c["one"], c["other"]) for c in record["comparisons"]}
    assert all(one == "pursuit" and other not in ("pursuit", "none") for one, other in pairs)
    assert all(c["p"] <= c["adjusted"] <= 1 for c in record["comparisons"])
    repeats = {(r["budget"], r["name"]): len(r["values"]) for r in record["repetitions"]}
    assert repeats["50", "control"] == 2 and repeats["50", "span"] == 2 and ("50", "pursuit") not in repeats
    numbers = {(n["variant"], n["benchmark"]): n for n in record["numbers"]}
    samples = len(finished.test.benchmarks["mm"].samples)
    assert (
        numbers[finished.chosen["chosen"]["50"]["control"], "mm"]["judges"]["lexicon"]["main"][3]
        == 2 * samples
    )
    # Pictures of examples are inside the page, which loads nothing.
    assert 'src="data:image/jpeg;base64,' in page and "@media print" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page.replace('xlink:href="#', ""))
    for figure in re.findall(r"\]\((figures/[^)]+)\)", notes):
        assert (finished.output / figure).is_file()


def test_answers_are_read_blind_and_come_back_into_the_report(finished, tmp_path, capsys):
    run = with_changes(finished, tmp_path)
    config = str(tmp_path / "evaluate.yaml")
    assert main(["evaluate", config, "--read", "12"]) == 0
    file = run.output / "read.tsv"
    text = file.read_text()
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    assert len(rows) == 12 and list(rows[0]) == list(COLUMNS) and not any(row["bad"] for row in rows)
    assert not any(cell.variant in text for cell in run.test.cells if "@" in cell.variant)
    key = json.loads((run.output / "read.key.json").read_text())
    assert len({row["variant"] for row in key}) >= 5  # variants take turns
    assert main(["evaluate", config, "--read", "12"]) == 0 and file.read_text() == text
    filled = [{**row, "bad": ("yes", "no", "Unsure", "")[i % 4]} for i, row in enumerate(rows)]
    with open(file, "w", newline="", encoding="utf-8-sig") as lines:
        table = csv.DictWriter(lines, COLUMNS, delimiter="\t")
        table.writeheader()
        table.writerows(filled)
    assert main(["evaluate", config, "--read", "20"]) == 2
    assert "is filled in already" in capsys.readouterr().err
    write_protocol_report(run)
    notes = (run.output / "report.md").read_text()
    section = notes.split("## Read by hand")[1].split("\n## ")[0]
    counts = [line.split("|")[3:5] for line in section.splitlines() if line.startswith("|")][2:]
    read = [pair for pair in counts if all(cell.strip().isdigit() for cell in pair)]
    assert sum(int(total) for total, _ in read) == 9 and "Cohen" in section
    file.write_text(file.read_text(encoding="utf-8-sig").replace("Unsure", "perhaps"))
    with pytest.raises(ArtifactError, match="must be yes, no or unsure, got 'perhaps'"):
        write_protocol_report(run)


def test_nothing_can_be_read_before_the_test(tmp_path):
    write_mm_safetybench(tmp_path / "mm")
    assert main(["evaluate", str(write_config(tmp_path)), "--read", "3"]) == 2


PROTOCOL = CONFIG["protocol"]


def methods(**more) -> dict:
    return {"methods": CONFIG["methods"] | more}


def protocol(**changes) -> dict:
    return {"protocol": PROTOCOL | changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            methods(add={"kind": "actadd", "strengths": [0.1]}),
            "got pursuit 2, rank-4 2, rank-8 2, add 1 (without a strength, hence exempt: system)",
        ),
        (methods(c={"kind": "random", "strengths": [1, 2]}), "'c' belongs to no method"),
        (
            methods(c={"kind": "random", "of": "pusuit"}),
            "no method 'pusuit' to control; did you mean 'pursuit'?",
        ),
        (methods(c={"kind": "random", "of": "rank-4"}), "only omp, elastic_net, sae"),
        (methods(c={"kind": "random", "of": "pursuit", "k": 3}), "key 'k' is unknown"),
        (methods(c={"kind": "random", "of": "pursuit", "match": "does"}), "did you mean 'dose'"),
        (methods(span={"kind": "system_prompt"}), "pool 'span' has the name of a method"),
        ({"protocol": {"budgets": [0.1]}}, "criterion is missing"),
        (protocol(budgets=[-1]), "budgets must be a number of 0 or more"),
        (protocol(reference="pursiut"), "did you mean 'pursuit'"),
        (protocol(divergence="mm"), "not measured on 'mm', only on benign"),
        (protocol(criterion={"judge": "lexicon", "benchmark": "mm", "rate": "ownn"}), "did you mean 'own'"),
        (protocol(criterion={"judge": "refusal", "benchmark": "mm", "rate": "refused"}), "on the question"),
        (protocol(constraints=[{"judge": "refusal", "benchmark": "mm"}]), "needs a bound"),
        ({"split": {"dev": 0}}, "needs both parts"),
        ({"generation": {"temperature": 1.0}, "seeds": [0, 1]}, "need three seeds or more"),
        ({"divergence": []}, "a budget needs a benchmark"),
    ],
)
def test_a_wrong_protocol_is_one_sentence(tmp_path, capsys, changes, said):
    assert main(["evaluate", str(write_config(tmp_path, **changes))]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_test_part_cannot_be_asked_for_alone(tmp_path, capsys):
    assert main(["evaluate", str(write_config(tmp_path)), "--part", "test"]) == 2
    assert "the test part is run by it, once" in capsys.readouterr().err


def test_a_criterion_of_bad_answers_needs_harmful_questions(tmp_path):
    write_mm_safetybench(tmp_path / "mm")
    goal = {"criterion": {"judge": "lexicon", "benchmark": "benign"}}
    config = read_config(write_config(tmp_path, protocol=PROTOCOL | goal))
    with pytest.raises(DacoError, match="benign has harmless questions only"):
        ProtocolRun(config)
