"""A judge that cannot be reached: the run goes on without it, and the same command asks it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from judge_server import closed_port, serving

from daco_rt.cli import main
from daco_rt.evaluate.choosing import FILE
from daco_rt.evaluate.config import read_config
from daco_rt.evaluate.run import Evaluation

VERDICT = json.dumps({"unsafe": False, "refused": False, "reason": "harmless"})


@pytest.fixture
def serve(monkeypatch):
    with serving(monkeypatch) as start:
        yield start


def write_config(folder: Path, port: int, **changes) -> Path:
    expert = {"kind": "endpoint", "url": f"http://127.0.0.1:{port}/v1", "model": "expert"}
    config = {
        "version": 1,
        "model": {"family": "internvl", "checkpoint": "pocket-internvl"},
        "dictionary": "built-in",
        "output": "run",
        "generation": {"max_new_tokens": 3, "batch_size": 4, "threads": 1},
        "benchmarks": {"benign": {"limit": 4}},
        "methods": {"none": {}},
        "judges": {"expert": expert | {"tries": 2, "pause": 0.01, "give_up": 2, "workers": 1}, "refusal": {}},
        "divergence": [],
        "perplexity": False,
        "timing": False,
    }
    file = folder / "evaluate.yaml"
    file.write_text(yaml.safe_dump(config | changes, sort_keys=False))
    return file


def judged(folder: Path) -> dict:
    (numbers,) = json.loads((folder / "run" / "report.json").read_text())["numbers"]
    return numbers["judges"]


def test_the_run_goes_on_and_the_same_command_asks_again(serve, tmp_path, capsys):
    port = closed_port()
    config = str(write_config(tmp_path, port))
    assert main(["evaluate", config]) == 0
    said = capsys.readouterr().err
    assert "warning: judge 'expert' could not be asked about 4 of 4 answers" in said
    assert "did not answer in 2 tries" in said and "asks about these" in said
    found = judged(tmp_path)
    assert found["expert"]["unjudged"][0] == 1 and found["expert"]["safe"][0] == 0
    assert found["refusal"]["unjudged"][0] == 1 and found["refusal"]["refused"][0] == 0
    verdicts = tmp_path / "run" / "verdicts"
    assert (verdicts / "refusal" / "benign" / "none-s0.jsonl").is_file()
    assert not (verdicts / "expert" / "benign" / "none-s0.jsonl").exists()
    assert "Judge 'expert' could not be asked about 4 of 4" in (tmp_path / "run" / "report.md").read_text()
    assert main(["evaluate", config, "--report-only"]) == 0
    assert "could not be asked about 4 of 4" in capsys.readouterr().err

    # It comes back, and breaks off in the middle: what it judged stays.
    flaky = serve(lambda _, count: VERDICT if count <= 3 else 503, port)
    assert main(["evaluate", config]) == 0
    assert "could not be asked about 1 of 4 answers" in capsys.readouterr().err
    assert judged(tmp_path)["expert"]["safe"][0] == 0.75
    flaky.http.shutdown()
    flaky.http.server_close()
    well = serve(lambda *_: VERDICT, port)
    assert main(["evaluate", config]) == 0
    assert "warning" not in capsys.readouterr().err and len(well.seen) == 1
    assert judged(tmp_path)["expert"]["safe"][0] == 1
    assert len((verdicts / "expert" / "benign" / "none-s0.jsonl").read_text().splitlines()) == 1 + 4
    before = len(well.seen)
    Evaluation(read_config(config)).run()
    assert len(well.seen) == before


def test_wrong_credentials_end_the_run(serve, tmp_path, capsys):
    server = serve(lambda *_: 403)
    port = server.http.server_port
    assert main(["evaluate", str(write_config(tmp_path, port))]) == 2
    assert "refused with status 403" in capsys.readouterr().err


def test_nothing_is_chosen_by_verdicts_that_are_missing(serve, tmp_path, capsys):
    port = closed_port()
    config = str(
        write_config(
            tmp_path,
            port,
            methods={"pursuit": {"kind": "omp", "strengths": [5.0]}},
            benchmarks={"concepts": {"forms": ["named"], "limit": 2}, "benign": {"limit": 2}},
            divergence=["benign"],
            protocol={"budgets": [1.0], "criterion": {"judge": "expert", "benchmark": "concepts"}},
        )
    )
    assert main(["evaluate", config]) == 1
    said = capsys.readouterr().err
    assert "could not be asked about 8 of 8 answers of part 'dev'" in said and "test part waits" in said
    assert not (tmp_path / "run" / FILE).exists() and not (tmp_path / "run" / "test").exists()
    assert "trials, no results" in (tmp_path / "run" / "report.md").read_text()
    serve(lambda *_: VERDICT, port)
    assert main(["evaluate", config]) == 0
    assert (tmp_path / "run" / FILE).is_file() and "warning" not in capsys.readouterr().err
