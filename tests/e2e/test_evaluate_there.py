"""Methods of kind pack and bundle: policies of something that is there already."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from daco_rt.cli import main
from daco_rt.evaluate.config import read_config
from daco_rt.evaluate.run import Evaluation


def write_config(folder: Path, methods: dict, **changes) -> Path:
    config = {
        "version": 1,
        "model": {"family": "internvl", "checkpoint": "pocket-internvl"},
        "output": "run",
        "generation": {"max_new_tokens": 4, "batch_size": 4, "threads": 1},
        "benchmarks": {"benign": {"limit": 3}},
        "methods": methods,
        "judges": {"refusal": {}},
        "timing": False,
    }
    file = folder / "evaluate.yaml"
    file.write_text(yaml.safe_dump(config | changes, sort_keys=False))
    return file


def test_a_pack_and_the_bundle_that_holds_it_run_and_agree(pocket_bundle, tmp_path):
    policies = ["default", "observe"]
    methods = {
        "shipped": {"kind": "bundle", "path": str(pocket_bundle), "policies": policies},
        "packed": {"kind": "pack", "path": str(pocket_bundle / "pack"), "policies": policies},
    }
    config = read_config(write_config(tmp_path, methods))
    assert main(["evaluate", str(config.path), "--json"]) == 0
    evaluation = Evaluation(config)
    found = {cell.variant: evaluation.answers(cell) for cell in evaluation.cells}
    nats = {cell.variant: evaluation.divergences(cell) for cell in evaluation.cells}
    assert list(found) == ["none", *(f"{name}@{policy}" for name in methods for policy in policies)]
    for name in methods:
        steered, watched = found[f"{name}@default"], found[f"{name}@observe"]
        assert all(answer.policy == "default" and answer.edited_rows for answer in steered.values())
        assert [a.token_ids for a in watched.values()] == [a.token_ids for a in found["none"].values()]
        assert max(max(row) for row in nats[f"{name}@default"].values()) > 1e-3
        assert max(max(row) for row in nats[f"{name}@observe"].values()) < 1e-6
    for key, answer in found["shipped@default"].items():
        assert answer.token_ids == found["packed@default"][key].token_ids
    shifts = [evaluation.neutral(name, f"{name}@default", "kl") for name in methods]
    assert max(map(max, shifts[0])) > 1e-3
    assert all(np.allclose(one, other, atol=1e-6) for one, other in zip(*shifts, strict=True))


@pytest.mark.parametrize("kind", ["pack", "bundle"])
def test_a_policy_that_is_not_there_is_refused_before_anything_runs(kind, pocket_bundle, tmp_path, capsys):
    path = pocket_bundle / "pack" if kind == "pack" else pocket_bundle
    methods = {"mine": {"kind": kind, "path": str(path), "policies": ["default", "defalut"]}}
    config = write_config(tmp_path, methods)
    assert main(["evaluate", str(config)]) == 2
    said = capsys.readouterr().err
    assert f"{config}, method 'mine': unknown policy 'defalut'" in said and "did you mean 'default'" in said
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()
    methods["mine"]["path"] = str(tmp_path / "nothing")
    assert main(["evaluate", str(write_config(tmp_path, methods))]) == 2
    said = capsys.readouterr().err
    assert f"{config}, method 'mine': " in said and "nothing" in said and not (tmp_path / "run").exists()


def test_a_condition_in_torch_is_refused_before_anything_runs(tmp_path, capsys):
    methods = {"gated": {"kind": "conditional", "strengths": [0.1]}}
    config = write_config(tmp_path, methods, engine="torch", dictionary="built-in")
    assert main(["evaluate", str(config)]) == 2
    assert "method 'gated' has a condition" in capsys.readouterr().err and not (tmp_path / "run").exists()
