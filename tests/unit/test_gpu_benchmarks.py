"""The GPU benchmarks run on the CPU in small, and their reports hold what a reader needs to judge them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daco_rt.errors import DacoError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
CASES = {
    "pursuit": {"SteerPursuit omp"},
    "sae": {"SteerSae topk", "SteerSae relu"},
    "decoder_7b": {"unsteered", "ActAdd", "edited latents only", "TopK bf16", "OMP", "TopK, PyTorch hooks"},
}


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    pytest.importorskip("torch")
    from daco_rt._native import library_path

    try:
        library_path("torch")
    except DacoError as error:
        pytest.skip(str(error))


def report_of(name: str, tmp_path: Path) -> dict[str, Any]:
    output = tmp_path / "report.json"
    done = run(name, "--quick", "--device", "cpu", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_quick_run_on_the_cpu_writes_a_report(name: str, tmp_path: Path):
    report = report_of(name, tmp_path)
    assert (report["format"], report["benchmark"], report["quick"]) == (
        "daco_rt.benchmark",
        f"gpu_{name}",
        True,
    )
    assert (
        report["finished"] and report["commit"] and report["machine"]["cpu"] and report["versions"]["torch"]
    )
    assert report["settings"]["device"].startswith("cpu")
    assert {row["case"] for row in report["rows"]} == CASES[name]
    for row in report["rows"]:
        assert row["check"]["passed"], row["check"]["detail"]
        assert row["samples"] >= 1 and row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["floor_ms"] > 0 and row["floor_bytes"] > 0


def test_a_7b_decoder_has_the_bytes_of_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from decoder import Shape

    assert Shape().weights == pytest.approx(7.07e9, rel=0.01)


def test_the_decoder_is_causal_and_reads_its_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import torch
    from decoder import TINY, Decoder

    decoder = Decoder(TINY, 2, torch.device("cpu"), compiled=False)
    decoder.step({})
    first = decoder.logits.clone()
    decoder.step({})
    assert torch.equal(first, decoder.logits)  # a replay of the same token
    for block in decoder.blocks:
        block.keys[:, :, -1] = 9.0  # after the token's own position
    decoder.step({})
    assert torch.equal(first, decoder.logits)
    for block in decoder.blocks:
        block.values[:, :, 0] += 3.0
    decoder.step({})
    assert not torch.equal(first, decoder.logits)


@pytest.mark.parametrize("name", CASES)
def test_help_says_how_to_run_it(name: str):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/gpu/{name}.py" in done.stdout
    assert all(option in done.stdout for option in ("--quick", "--device", "--compact"))


def test_the_decoder_can_be_asked_for_one_batch_size(tmp_path: Path):
    output = tmp_path / "report.json"
    done = run("decoder_7b", "--quick", "--device", "cpu", "--batch", "2", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["shape"]["B"] for row in json.loads(output.read_text(encoding="utf-8"))["rows"]} == {2}
