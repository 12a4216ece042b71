"""Tasks, scorers and the provider in Inspect itself.

``make test-inspect`` runs this in an environment of its own, for Inspect holds other versions of two packages
than ours; elsewhere it is skipped.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from daco_rt.evaluate.benchmarks import READERS, load_benchmark
from daco_rt.evaluate.layouts import (
    write_harmbench,
    write_jailbreakv,
    write_mm_safetybench,
    write_strongreject,
)
from daco_rt.evaluate.subject import BundleSubject
from daco_rt.runtime import GenerateRequest, Generator

inspect_ai = pytest.importorskip("inspect_ai")

from daco_rt.evaluate import inspect_plugin  # noqa: E402  (registers itself)
from daco_rt.scenes.files import write_scenes  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def run(task, model: str, tmp_path: Path, **arguments):
    (log,) = inspect_ai.eval(
        task,
        model=model,
        model_args={"batch_size": 3} | arguments,
        log_dir=str(tmp_path / "logs"),
        display="none",
    )
    return log


@pytest.fixture(scope="module")
def mm(tmp_path_factory) -> Path:
    return write_mm_safetybench(tmp_path_factory.mktemp("data") / "mm")


def test_answers_are_those_of_the_runtime_and_the_log_says_which_data(pocket_bundle, mm, tmp_path):
    task = inspect_plugin.mm_safetybench(str(mm), methods="SD_TYPO,Text_only", questions=7, max_tokens=4)
    log = run(task, f"daco/{pocket_bundle}", tmp_path, policy="default", threads=1)
    assert log.status == "success" and len(log.samples) == 7
    told = log.eval.metadata["dataset"]
    assert told["name"] == "mm_safetybench" and len(told["sha256"]) == 64 and told["licence"]
    read = load_benchmark("mm_safetybench", mm, methods=["SD_TYPO", "Text_only"])
    samples = {s.id: s for s in read.samples}
    generator = Generator(pocket_bundle, threads=1)
    for logged in log.samples:
        sample = samples[logged.id]
        images = () if sample.image is None else (sample.image,)
        (expected,) = generator.generate(
            [GenerateRequest(sample.prompt, images=images, policy="default", max_new_tokens=4)]
        )
        assert logged.output.completion == expected.text
        steering = logged.output.metadata["steering"]
        assert steering["policy"] == "default" and steering["rows"] == len(expected.telemetry.positions)
        assert logged.output.usage.output_tokens == len(expected.token_ids)
        for judge in ("refusal", "lexicon"):
            value = logged.scores[judge].value
            assert value["unsafe"] + value["safe"] + value["unjudged"] == 1
    assert {image is not None for image in (samples[s.id].image for s in log.samples)} == {True, False}


def test_a_checkpoint_in_torch_answers_as_the_bundle_does(pocket_bundle, tmp_path):
    file = write_strongreject(tmp_path / "strongreject_dataset.csv")
    in_torch = {"family": "internvl", "pack": str(pocket_bundle / "pack")}
    logs = [
        run(inspect_plugin.strongreject(str(file), questions=4, max_tokens=4), model, tmp_path, **arguments)
        for model, arguments in (
            (f"daco/{pocket_bundle}", {"policy": "default"}),
            ("daco/pocket-internvl", {"policy": "default", **in_torch}),
        )
    ]
    answers = [{s.id: s.output.completion for s in log.samples} for log in logs]
    assert answers[0] == answers[1] and len(answers[0]) == 4


def test_harmless_questions_without_steering(pocket_bundle, tmp_path):
    task = inspect_plugin.benign(questions=3, max_tokens=2, judges="refusal", part="dev")
    log = run(task, f"daco/{pocket_bundle}", tmp_path, policy="off")
    assert all(s.output.metadata["steering"]["rows"] == 0 for s in log.samples)
    assert {s.name for s in log.results.scores} == {"unsafe", "safe", "unjudged", "refused"}


@pytest.fixture(scope="module")
def places(tmp_path_factory, mm) -> dict[str, Path | None]:
    """Benchmark → where its data lie."""
    folder = tmp_path_factory.mktemp("sets")
    jailbreakv = write_jailbreakv(folder / "jbv")
    return {
        "benign": None,
        "concepts": None,
        "harmbench": write_harmbench(folder / "harmbench_behaviors_text_test.csv"),
        "jailbreakv": jailbreakv,
        "mm_safetybench": mm,
        "redteam_2k": jailbreakv,
        "scenes": write_scenes(folder / "scenes", count=30),
        "strongreject": write_strongreject(folder / "strongreject_dataset.csv"),
    }


@pytest.mark.parametrize("name", sorted(READERS))
def test_every_benchmark_is_a_task_that_goes_on_after_an_interrupt(
    name, places, pocket_bundle, tmp_path, monkeypatch
):
    asked = []
    original = BundleSubject._answer

    def stops(self, requests):
        if len(asked) >= 2:
            raise RuntimeError("the machine was switched off")
        asked.extend(requests)
        return original(self, requests)

    arguments = {"questions": 4, "max_tokens": 2, "judges": "refusal", "part": "all"}
    if places[name] is not None:
        arguments["path"] = str(places[name])
    task = getattr(inspect_plugin, name)(**arguments)
    monkeypatch.setattr(BundleSubject, "_answer", stops)
    options = {"policy": "off", "threads": 1, "batch_size": 1}
    log = run(task, f"daco/{pocket_bundle}", tmp_path, **options)
    assert log.status == "error" and len(asked) == 2

    again = []
    monkeypatch.setattr(BundleSubject, "_answer", lambda self, r: again.extend(r) or original(self, r))
    (log,) = inspect_ai.eval_retry(log, log_dir=str(tmp_path / "logs"), display="none")
    assert log.status == "success" and len(log.samples) == 4
    first, second = ({f"{r.prompt} {r.images}" for r in some} for some in (asked, again))
    assert len(again) == 2 and not first & second
    told = log.eval.metadata["dataset"]
    read = load_benchmark(name, places[name], **({"table": "mini"} if name == "jailbreakv" else {}))
    assert told == read.card.to_json()
    assert told["version"] and told["licence"] and len(told["sha256"]) == 64


def test_tasks_pass_the_options_of_their_readers_on(places, mm):
    def samples(task):
        return {s.id: s for s in task.dataset}

    jbv, options = str(places["jailbreakv"]), {"part": "all"}
    full = samples(inspect_plugin.jailbreakv(jbv, table="full", **options))
    read = load_benchmark("jailbreakv", places["jailbreakv"], formats=["figstep"])
    some = samples(inspect_plugin.jailbreakv(jbv, table="full", formats="figstep", **options))
    assert set(some) == {s.id for s in read.samples} < set(full)
    bare = samples(inspect_plugin.jailbreakv(jbv, pictures=False, **options))
    assert bare and all(isinstance(s.input, str) for s in bare.values())
    assert set(bare) == {
        s.id for s in load_benchmark("jailbreakv", places["jailbreakv"], table="mini").samples
    }
    asked = samples(inspect_plugin.scenes(str(places["scenes"]), question="What is here?", **options))
    assert all("What is here?" in s.input[0].text for s in asked.values())
    fraud = samples(inspect_plugin.mm_safetybench(str(mm), scenarios="06-Fraud,Physical_Harm", **options))
    assert {s.metadata["category"] for s in fraud.values()} == {"06-Fraud", "04-Physical_Harm"}


def test_the_log_is_one_that_inspect_shows(pocket_bundle, tmp_path):
    from inspect_ai.log import bundle_log_dir, list_eval_logs, read_eval_log, read_eval_log_sample_summaries

    task = inspect_plugin.benign(questions=2, max_tokens=2, judges="refusal,lexicon")
    log = run(task, f"daco/{pocket_bundle}", tmp_path, policy="default", threads=1)
    # `inspect view` lists the folder, reads the summaries, and opens a sample; a bundle is the same page.
    (found,) = list_eval_logs(str(tmp_path / "logs"))
    summaries = read_eval_log_sample_summaries(found)
    assert [s.error for s in summaries] == [None, None] and all(
        {"refusal", "lexicon"} <= set(s.scores) for s in summaries
    )
    read = read_eval_log(found)
    assert [s.output.completion for s in read.samples] == [s.output.completion for s in log.samples]
    assert read.samples[0].output.metadata["steering"]["policy"] == "default"
    command = [sys.executable, "-m", "inspect_ai", "log", "dump", found.name]
    dumped = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert dumped["status"] == "success" and len(dumped["samples"]) == 2
    assert dumped["samples"][0]["scores"]["lexicon"]["value"].keys() == {
        "unsafe",
        "safe",
        "unjudged",
        "refused",
    }
    bundle_log_dir(str(tmp_path / "logs"), output_dir=str(tmp_path / "page"))
    assert (tmp_path / "page" / "index.html").is_file() and list((tmp_path / "page" / "logs").glob("*.eval"))


def test_wrong_names_are_refused_before_anything_runs(pocket_bundle):
    from inspect_ai.model import get_model

    from daco_rt.errors import DacoError

    with pytest.raises(DacoError, match="judge 'lexikon' is unknown; did you mean 'lexicon'"):
        inspect_plugin.benign(judges="lexikon")
    with pytest.raises(DacoError, match="argument 'limit' is unknown"):
        inspect_plugin.benign(limit=3)
    with pytest.raises(Exception, match="policy 'defalt'"):
        get_model(f"daco/{pocket_bundle}", policy="defalt")
    with pytest.raises(Exception, match="'polcy' is unknown"):
        get_model(f"daco/{pocket_bundle}", polcy="default")


def test_the_declared_entry_point_is_the_plug_in():
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["inspect_ai"]
    module = importlib.import_module(declared["daco_rt"])
    names = {*READERS, "daco"}
    assert names <= set(vars(module))
