"""An evaluation as a user runs it: small sets of our own, the pocket model, every kind of method."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from daco_rt.cli import main
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.evaluate.benchmarks import load_benchmark
from daco_rt.evaluate.config import read_config
from daco_rt.evaluate.content import commands
from daco_rt.evaluate.layouts import write_mm_safetybench
from daco_rt.evaluate.metrics import kl_nats, token_nats, wilson
from daco_rt.evaluate.page import markdown, page
from daco_rt.evaluate.perplexity import neutral_passages, neutral_texts
from daco_rt.evaluate.run import Cell, Evaluation
from daco_rt.evaluate.subject import Ask, BundleSubject, Subject
from daco_rt.evaluate.torch_subject import TorchSubject
from daco_rt.evaluate.values import plain
from daco_rt.runtime import GenerateRequest

CONFIG = {
    "version": 1,
    "model": {"family": "internvl", "checkpoint": "pocket-internvl"},
    "dictionary": "built-in",
    "output": "run",
    "generation": {"max_new_tokens": 4, "batch_size": 4, "threads": 1},
    "benchmarks": {
        "mm": {"kind": "mm_safetybench", "path": "mm", "methods": ["SD_TYPO", "Text_only"], "limit": 4},
        "benign": {"limit": 4},
    },
    "methods": {
        "system": {"kind": "system_prompt"},
        "pursuit": {"kind": "omp", "strengths": [0.3, 5.0]},
        "gated": {"kind": "conditional", "strengths": [0.0001, 50.0], "deadband": 0.3},
        "control": {"kind": "random", "strengths": [0.3]},
        "add": {"kind": "actadd", "strengths": [0.5], "positions": "generated"},
        "project": {"kind": "projection", "strengths": [1.0], "rank": 8},
    },
    "judges": {"refusal": {}, "lexicon": {}},
}


def write_config(folder: Path, **changes) -> Path:
    file = folder / "evaluate.yaml"
    file.write_text(yaml.safe_dump(CONFIG | changes))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Evaluation:
    """A run through the command line."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_mm_safetybench(folder / "mm")
    assert main(["evaluate", str(write_config(folder)), "--json"]) == 0
    return Evaluation(read_config(folder / "evaluate.yaml"))


def texts(evaluation: Evaluation, variant: str, benchmark: str = "mm") -> list[list[int]]:
    cell = next(c for c in evaluation.cells if (c.variant, c.benchmark) == (variant, benchmark))
    return [answer.token_ids for answer in evaluation.answers(cell).values()]


def test_every_cell_has_answers_verdicts_and_divergences(finished):
    assert len(finished.cells) == 2 * 9
    for cell in finished.cells:
        ids = [sample.id for sample in finished.benchmarks[cell.benchmark].samples]
        assert list(finished.answers(cell)) == ids
        for judge in ("refusal", "lexicon"):
            assert list(finished.verdicts(cell, judge)) == ids
    assert {s.image is None for s in finished.benchmarks["mm"].samples} == {True, False}


def test_methods_without_effect_change_nothing_and_others_do(finished):
    plain = texts(finished, "none")
    assert texts(finished, "pursuit@5") == plain  # no code is as strong as the deadband
    assert texts(finished, "gated@50") == plain  # no prompt holds as much
    for variant in ("pursuit@0.3", "add@0.5", "project@1", "control@0.3"):
        assert texts(finished, variant) != plain, variant
    assert texts(finished, "system") != plain


def test_gates_act_or_do_not(finished):
    def policies(variant):
        cell = next(c for c in finished.cells if c.variant == variant)
        return {answer.policy for answer in finished.answers(cell).values()}

    assert policies("gated@50") == {"observe"} and "gated@0.0001" in policies("gated@0.0001")


def test_the_control_fires_as_often_as_what_it_controls(finished):
    notes = json.loads((finished.output / "packs" / "control.notes.json").read_text())
    row = notes["control@0.3"]
    assert row["firing share of undesirable atoms"] > 0.05
    assert row["firing share of random atoms"] == pytest.approx(
        row["firing share of undesirable atoms"], abs=0.01
    )


def test_divergence_is_zero_where_nothing_changes_and_that_of_the_logits_elsewhere(finished):
    by_variant = {c.variant: finished.divergences(c) for c in finished.cells if c.benchmark == "benign"}
    assert all(finished.divergences(c) is None for c in finished.cells if c.benchmark == "mm")
    for variant in ("none", "pursuit@5"):
        assert all(nats == 0 for row in by_variant[variant].values() for nats in row)
    sample = finished.benchmarks["benign"].samples[0]
    plain = next(c for c in finished.cells if c.benchmark == "benign")
    ids = finished.answers(plain)[sample.id].token_ids
    subject = BundleSubject(finished.output / "bundles" / "add", threads=1)
    p, q = (next(subject.logits([Ask(sample.prompt)], [ids], policy=policy)) for policy in ("off", "add@0.5"))
    assert np.allclose(by_variant["add@0.5"][sample.id], kl_nats(p, q), rtol=1e-3, atol=1e-6)
    assert by_variant["add@0.5"][sample.id][0] > 1e-3


def test_neutral_text_has_the_numbers_of_the_logits(finished, tmp_path, monkeypatch):
    subject = BundleSubject(finished.output / "bundles" / "add", threads=1)
    texts = neutral_texts()
    first = texts[3].split(" ", 1)[0]
    ids = subject.processor.prepare(texts[3], raw=True).input_ids.tolist()
    given = ids[len(subject.processor.prepare(first, raw=True).input_ids) :]
    p, q = (
        next(subject.logits([Ask(first, raw=True)], [given], policy=policy)) for policy in ("off", "add@0.5")
    )
    nats, kl = (finished.neutral("add", "add@0.5", what) for what in ("nats", "kl"))
    assert len(nats) == len(kl) == len(texts) == 16
    assert np.allclose(kl[3], kl_nats(p, q), rtol=1e-3, atol=1e-6) and max(kl[3]) > 1e-3
    assert np.allclose(nats[3], token_nats(q, given), rtol=1e-3, atol=1e-5)
    for method, variant in (("none", "none"), ("pursuit", "pursuit@5")):
        assert max(map(max, finished.neutral(method, variant, "kl"))) < 1e-9
    assert finished.neutral("system", "system", "kl") is None
    whole = list(neutral_passages(subject, policy="add@0.5", texts=texts[:3]))
    monkeypatch.setattr("daco_rt.evaluate.perplexity.PIECE", 1)
    for one, other in zip(whole, neutral_passages(subject, policy="add@0.5", texts=texts[:3]), strict=True):
        assert np.allclose(one.kl, other.kl, rtol=1e-3, atol=1e-6)
    (row,) = [
        n
        for n in json.loads((finished.output / "report.json").read_text())["numbers"]
        if (n["variant"], n["benchmark"]) == ("add@0.5", "benign")
    ]
    assert row["kl_neutral"][0] == pytest.approx(np.mean(np.concatenate(kl))) and row["kl_neutral"][3] == 16
    notes = (finished.output / "report.md").read_text()
    assert "KL, neutral text" in notes and notes.rstrip().endswith("--part test\n```") and "/../" not in notes


def test_folders_from_before_the_divergence_on_neutral_text_go_on(finished, tmp_path):
    shutil.copytree(finished.output, tmp_path / "run")
    (tmp_path / "mm").symlink_to(finished.config.path.parent / "mm")
    file = tmp_path / "run" / "perplexity" / "add@0.5.jsonl"
    header, *rows = map(json.loads, file.read_text().splitlines())
    for row in rows:
        del row["kl"]
    file.write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)))
    assert main(["evaluate", str(write_config(tmp_path)), "--json"]) == 0
    numbers = json.loads((tmp_path / "run" / "report.json").read_text())["numbers"]
    empty = {n["variant"] for n in numbers if n["kl_neutral"] is None}
    assert empty == {"system", "add@0.5"}
    assert all(n["perplexity"] is not None for n in numbers if n["variant"] == "add@0.5")


@pytest.mark.parametrize("engine", ["bundle", "torch"])
def test_scores_are_those_of_the_logits_whatever_the_pieces(engine, pocket_bundle, pocket, monkeypatch):
    subject: Subject
    if engine == "bundle":
        subject = BundleSubject(pocket_bundle, threads=1, batch_size=3)
    else:
        subject = TorchSubject("internvl", pocket.path, pack=pocket_bundle / "pack", batch_size=3)
    prompts = ["What is a dagger?", "Bread.", "How far is the station from the river?", "Rain"]
    texts = [" It is a weapon", " No", " It is two miles, all of them uphill", " fell"]
    answers = [subject.processor.raw_ids(text) for text in texts]
    asks = [Ask(prompt, raw=True) for prompt in prompts]
    found = {}
    for policy in ("off", "default"):
        logits = list(subject.logits(asks, answers, policy=policy))
        requests = [GenerateRequest(prompt, policy=policy, raw=True) for prompt in prompts]
        monkeypatch.setattr("daco_rt.evaluate.subject.PIECE", 3 * len(subject.processor.tokenizer) * 2)
        for rows, ids, score in zip(logits, answers, subject.score(requests, answers), strict=True):
            assert score.nats == pytest.approx(token_nats(rows, ids), rel=1e-4, abs=1e-4)
            assert score.greedy.tolist() == (rows.argmax(-1) == ids).tolist()
            assert np.allclose(score.last, rows[-1], atol=1e-4)
        found[policy] = np.concatenate([token_nats(r, ids) for r, ids in zip(logits, answers, strict=True)])
    assert not np.allclose(found["off"], found["default"], atol=1e-3)
    with pytest.raises(DacoError, match="without tokens"):
        next(subject.score([GenerateRequest("Bread.", raw=True)], [[]]))


def test_a_second_run_generates_nothing_and_an_interrupted_one_goes_on(finished, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.output.rglob("*.jsonl")}
    Evaluation(finished.config).run()
    assert {path: path.stat().st_mtime_ns for path in finished.output.rglob("*.jsonl")} == before

    write_mm_safetybench(tmp_path / "mm")
    small = {
        "methods": {"pursuit": CONFIG["methods"]["pursuit"]},
        "generation": {**CONFIG["generation"], "batch_size": 2},
    }
    config = read_config(write_config(tmp_path, **small))
    calls = []
    original = BundleSubject._answer

    def stops(self, requests):
        calls.append(len(requests))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, requests)

    monkeypatch.setattr(BundleSubject, "_answer", stops)
    with pytest.raises(KeyboardInterrupt):
        Evaluation(config).run()
    # A kill while a line is written leaves a torn one, which is not an answer.
    (torn,) = config.output.rglob("*.partial")
    rows = torn.read_text().splitlines()
    assert len(rows) == 1 + 2
    torn.write_text(torn.read_text() + '{"id": "e0')
    monkeypatch.setattr(BundleSubject, "_answer", original)
    again = Evaluation(config)
    again.run()
    for variant in ("none", "pursuit@0.3"):
        for benchmark in ("mm", "benign"):
            assert texts(again, variant, benchmark) == texts(finished, variant, benchmark)


def test_seeds_differ_and_a_question_keeps_its_draw_wherever_a_run_stopped(tmp_path):
    changes = {
        "generation": {**CONFIG["generation"], "temperature": 1.0, "batch_size": 2},
        "seeds": [0, 1],
        "benchmarks": {"benign": {"limit": 5}},
        "methods": {"none": {}},
        "perplexity": False,
        "timing": False,
        "divergence": [],
    }
    whole = Evaluation(read_config(write_config(tmp_path, **changes)))
    whole.run()
    first, second = ([a.token_ids for a in whole.answers(cell).values()] for cell in whole.cells)
    assert first != second
    cell = whole.cells[0]
    path = whole.output / "answers" / f"{cell.stem}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.unlink()
    path.with_name(f"{path.name}.partial").write_text("".join(lines[:4]))  # the header and three answers
    whole.run()
    assert [a.token_ids for a in whole.answers(cell).values()] == first


def test_other_settings_do_not_mix(finished, tmp_path):
    changed = CONFIG["generation"] | {"max_new_tokens": 5}
    folder = finished.config.path.parent
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(CONFIG | {"generation": changed}))
    (tmp_path / "mm").symlink_to(folder / "mm")
    config = read_config(file, output=finished.output)
    with pytest.raises(ArtifactError, match=r"other settings \(max_new_tokens: 4 there, 5 now\)"):
        Evaluation(config).answers(Cell("none", "none", None, "mm", 0))


def test_verdicts_of_a_judge_with_other_options_are_refused(finished, tmp_path):
    (tmp_path / "mm").symlink_to(finished.config.path.parent / "mm")
    judges = {"refusal": {"count_rest_as_unsafe": True}, "lexicon": {}}
    config = read_config(write_config(tmp_path, judges=judges), output=finished.output)
    with pytest.raises(ArtifactError, match=r"refusal.*was made under other settings"):
        Evaluation(config).run()


def test_torch_and_bundle_give_the_same_answers(finished, tmp_path):
    (tmp_path / "mm").symlink_to(finished.config.path.parent / "mm")
    methods = {name: CONFIG["methods"][name] for name in ("system", "control", "add")}
    config = read_config(write_config(tmp_path, engine="torch", methods=methods))
    torch_run = Evaluation(config)
    torch_run.run()
    # "add" edits generated tokens alone and took the prompts as "none" left them.
    assert torch_run.workshop._loaded.held
    for cell in torch_run.cells:
        ours, theirs = torch_run.answers(cell), finished.answers(cell)
        for key, answer in ours.items():
            other = theirs[key]
            assert answer.token_ids == other.token_ids, (cell.stem, key)
            assert (answer.text, answer.rows, answer.edited_rows) == (
                other.text,
                other.rows,
                other.edited_rows,
            )
            assert answer.removed == other.removed
        if cell.method != "system":
            ours, theirs = (run.neutral(cell.method, cell.variant, "kl") for run in (torch_run, finished))
            assert all(np.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
        nats = torch_run.divergences(cell)
        if nats is not None:
            expected = finished.divergences(cell)
            assert all(np.allclose(nats[key], expected[key], rtol=1e-2, atol=1e-4) for key in nats)


def test_the_report_holds_the_numbers_and_loads_nothing(finished):
    html = (finished.output / "report.html").read_text()
    notes = (finished.output / "report.md").read_text()
    record = json.loads((finished.output / "report.json").read_text(), parse_constant=pytest.fail)
    assert html.count("<svg") == 4 and "<script" not in html
    assert not re.search(r'(?:src|href)="(?!#|data:)', html.replace('xlink:href="#', ""))
    assert len(record["numbers"]) == 18
    for cell in finished.cells:
        assert f"| {cell.variant} |" in notes
    for figure in re.findall(r"\]\((figures/[^)]+)\)", notes):
        assert (finished.output / figure).read_text().startswith("<svg")
    slower = {n["variant"]: n["slowdown"] for n in record["numbers"]}
    assert slower["none"] is None and slower["system"] is None
    assert all(0.05 < slower[v][0] < 20 and slower[v][3] == 5 for v in ("pursuit@0.3", "add@0.5"))
    exact = {n["variant"]: n["exact"][0] for n in record["numbers"] if n["benchmark"] == "benign"}
    assert exact["none"] == exact["pursuit@5"] == 1.0 and exact["pursuit@0.3"] < 1.0
    told = json.loads((finished.output / "run.json").read_text())
    assert told["benchmarks"]["mm"]["sha256"] == finished.benchmarks["mm"].card.sha256
    # Only report.json is kept as a result, so it says all that run.json does.
    # A run that finds everything there writes run.json again, perhaps at another commit or with other judges.
    later = {"commit": "", "config": {}}
    assert record["run"] | later == told | later and told["machine"]["cores"] >= 1
    assert record["run"]["config"]["methods"] == CONFIG["methods"]
    assert set(told["machine"]) == {
        "cpu", "cores", "flags", "last_level_cache_bytes", "memory_bytes", "system"
    }  # fmt: skip


def test_numbers_that_do_not_exist_are_null():
    record = plain({"a": float("nan"), "b": wilson(0, 0), "c": [1, float("inf")], "d": "NaN"})
    assert record == {"a": None, "b": [None, None, None, 0], "c": [1, None], "d": "NaN"}


def test_the_command_prints_json(finished, capsys):
    assert main(["evaluate", str(finished.config.path), "--report-only", "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_the_report_says_how_to_repeat_it(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    write_config(folder, prepare=["make <pictures>", "daco-rt build saes.yaml # slow"], output="../runs/mine")
    monkeypatch.chdir(tmp_path)
    config = read_config(Path("configs/evaluate.yaml"))
    (section,) = [part.lines for part in commands(config, "--part", "dev").parts]
    assert section == (
        "make <pictures>",
        "daco-rt build saes.yaml # slow",
        "daco-rt evaluate configs/evaluate.yaml --output runs/mine --part dev",
    )
    sections = [commands(config)]
    assert "```sh\nmake <pictures>\n" in markdown("T", sections)
    assert "<pre>make &lt;pictures&gt;\n" in page("T", sections)


def test_a_report_of_an_unfinished_run_is_refused(tmp_path, capsys):
    write_mm_safetybench(tmp_path / "mm")
    assert main(["evaluate", str(write_config(tmp_path)), "--report-only"]) == 2
    assert "18 of 18 cells are not finished" in capsys.readouterr().err


def test_a_prompt_that_does_not_fit_is_an_answer_that_nobody_judged_safe(finished):
    subject = BundleSubject(finished.output / "bundles" / "plain", threads=1, batch_size=2)
    long, short = subject.answer([Ask("word " * 9000), Ask("Hello")], policy="off", max_new_tokens=2)
    assert long.error and not long.text and long.finish_reason == "refused by the runtime"
    assert len(short.token_ids) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version must be 1"),
        ({"bencmarks": {}}, "did you mean 'benchmarks'"),
        ({"engine": "bundel"}, "did you mean 'bundle'"),
        ({"model": CONFIG["model"] | {"device": "cuda"}}, "device is for engine: torch"),
        ({"seeds": [0, 1]}, "several seeds give the same greedy answers"),
        ({"methods": {"a": {"kind": "omp"}}}, "needs strengths"),
        ({"methods": {"a": {"kind": "none", "strengths": [1]}}}, "takes no strengths"),
        ({"methods": {"a": {"kind": "opm", "strengths": [1]}}}, "did you mean 'omp'"),
        ({"methods": {"a/b": {"kind": "none"}}}, "must be of letters, digits"),
        ({"methods": {"a": {"kind": "omp", "strengths": [1], "rank": 3}}}, "takes no option 'rank'"),
        ({"judges": {"words": {"kind": "lexikon"}}}, "did you mean 'lexicon'"),
        ({"judges": {"refusal": {"strict": True}}}, "key 'strict' is unknown"),
        ({"benchmarks": {"benign": {"limit": 0}}}, "limit must be an integer from 1"),
        ({"benchmarks": {"benign": {"limit": {"tset": 4}}}}, "did you mean 'test'"),
        ({"benchmarks": {"benign": {"limit": {"dev": 0}}}}, "limit, dev must be an integer from 1"),
        ({"split": {"part": "tset"}}, "did you mean 'test'"),
        ({"divergence": ["bening"]}, "did you mean 'benign'"),
        ({"prepare": "make scenes"}, "prepare must be a list of commands"),
        ({"prepare": [3]}, "prepare: a command must be text"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(tmp_path, capsys, changes, said):
    assert main(["evaluate", str(write_config(tmp_path, **changes))]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_example_configuration_is_right():
    config = read_config(Path(__file__).parents[2] / "configs" / "evaluate.yaml", part="dev")
    assert list(config.methods)[:2] == ["none", "system_prompt"] and config.part == "dev"
    assert config.benchmarks["strongreject"].path.name == "harm-prompts" and config.divergence == ("benign",)
    assert config.prepare == ("python scripts/fetch_harm_prompts.py",)


def test_the_configuration_for_smol_splits_no_concept():
    config = read_config(Path(__file__).parents[2] / "configs" / "evaluate-smol.yaml")
    assert {m.kind for m in config.methods.values()} >= {"omp", "elastic_net", "conditional", "sae", "random"}
    assert len({len(m.strengths) for m in config.methods.values() if m.strengths}) == 1
    for name, data in config.benchmarks.items():
        if data.path is None:
            whole = load_benchmark(data.kind, **data.options)
            dev, test = (
                whole.part(part, dev=config.dev, limit=data.limits[part]) for part in ("dev", "test")
            )
            assert len(test.samples) == data.limits["test"] >= 48, name
            assert not {s.group or s.id for s in dev.samples} & {s.group or s.id for s in test.samples}


def test_methods_that_need_a_dictionary_say_so(tmp_path):
    config = write_config(tmp_path, dictionary=None, benchmarks={"benign": {"limit": 1}})
    with pytest.raises(DacoError, match="is made from a dictionary"):
        Evaluation(read_config(config)).run()
