"""What stands around the GPU's checks runs without one: refusals, the table of steps, the summary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
SUMMARY = ROOT / "benchmarks" / "gpu" / "summary.py"
BENCHES = ("sae", "pursuit", "decoder_7b_b1", "decoder_7b_b16")

# A torch that sees a GPU or none, in a folder of its own.
TORCH = "class cuda:\n    is_available = staticmethod(lambda: {gpu})\n"


def tree(folder: Path, *, gpu: bool | None) -> Path:
    """A copy of the scripts without the project, so that nothing is built and nothing of ours is written to;
    ``gpu`` None leaves torch out too."""
    (folder / "benchmarks" / "gpu").mkdir(parents=True)
    shutil.copy(SCRIPT, folder / "benchmarks")
    shutil.copy(SUMMARY, folder / "benchmarks" / "gpu")
    shutil.copy(ROOT / "benchmarks" / "harness.py", folder / "benchmarks")
    (folder / "modules").mkdir()
    if gpu is not None:
        (folder / "modules" / "torch.py").write_text(TORCH.format(gpu=gpu))
    return folder


def gpu_check(
    folder: Path, *words: str, path: str = os.defpath, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{folder / 'bin'}:{path}", "PYTHON": sys.executable, "PYTHONPATH": str(folder / "modules"),
        "HOME": str(folder), "PYTHONNOUSERSITE": "1", **variables,
    }  # fmt: skip
    return subprocess.run(
        ["sh", str(folder / "benchmarks" / "gpu_check.sh"), *words],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip


def program(folder: Path, name: str, text: str) -> None:
    """Put a program on the path of ``gpu_check``."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bin" / name).chmod(0o755)


def test_help_names_every_command_and_what_all_takes(tmp_path: Path):
    done = gpu_check(tree(tmp_path, gpu=False))
    assert done.returncode == 2
    for word in (
        "all",
        "build",
        "test",
        "sanitize",
        "bench",
        "summary",
        "clean",
        "BUDGET",
        "WHEELS",
        *BENCHES,
    ):
        assert word in done.stdout, word
    # The steps that the help announces are those that are run.
    text = SCRIPT.read_text(encoding="utf-8")
    for file in (ROOT / "tests" / "gpu").glob("test_*.py"):
        assert f"  {file.stem} " in done.stdout and f" {file.stem}" in text[text.index("test_files()") :]


@pytest.mark.parametrize("command", ["all", "test", "sanitize", "bench"])
def test_without_a_gpu_one_sentence_says_so(command: str, tmp_path: Path):
    folder = tree(tmp_path, gpu=False)
    for tool in ("nvcc", "cmake"):
        program(folder, tool, "exit 1")
    done = gpu_check(folder, command)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines() == [
        "gpu_check: torch finds no GPU here (torch.cuda.is_available() is false); run this on a machine with "
        "an NVIDIA GPU and its driver"
    ]


def test_what_else_is_missing_is_said_by_name(tmp_path: Path):
    folder = tree(tmp_path, gpu=True)
    for words, sentence in (
        (["test"], "nothing is built in build/gpu/site; run sh benchmarks/gpu_check.sh build first"),
        (["bench", "saw"], "there is no benchmark saw; it is one of " + ", ".join(BENCHES)),
    ):
        done = gpu_check(folder, *words)
        assert done.returncode == 1 and done.stderr == f"gpu_check: {sentence}\n"
    done = gpu_check(folder, "build", PYTHON=str(tmp_path / "no-python"))
    assert done.returncode == 1 and "no-python; name an interpreter" in done.stderr
    only = tmp_path / "few"
    only.mkdir()
    for tool in ("sh", "dirname", "mkdir", "date"):
        (only / tool).symlink_to(shutil.which(tool) or tool)
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        done = gpu_check(folder, "build", path=str(only))
        assert done.returncode == 1 and done.stderr.startswith("gpu_check: nvcc is not on PATH; ")


def test_a_broken_torch_is_told_from_a_missing_gpu(tmp_path: Path):
    folder = tree(tmp_path, gpu=None)
    (folder / "modules" / "torch.py").write_text("raise ImportError('libcudart is missing')\n")
    done = gpu_check(folder, "test")
    assert done.returncode == 1 and "cannot import torch" in done.stderr


def test_all_keeps_to_its_budget_goes_on_and_publishes(tmp_path: Path):
    """Stand-ins for what only a GPU runs: verdicts, order, files and what is done again are the script's."""
    folder = tree(tmp_path, gpu=True)
    for tool in ("nvcc", "cmake"):
        program(folder, tool, "exit 0")
    out = tmp_path / "out"
    out.mkdir()
    for part in ("python/daco_rt", "export", "build/gpu/state"):
        (folder / part).mkdir(parents=True)
    # The end of the build loads the library, which is not there.
    first = gpu_check(folder, "all", OUT=str(out))
    assert first.returncode == 1 and "== build: failed (1)" in first.stdout
    assert "test_sae_gpu" not in first.stdout  # without a build nothing else is worth its time
    found = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert [(s["name"], s["verdict"]) for s in found["steps"]] == [("build", "failed (1)")]
    assert "Error" in found["steps"][0]["last_line"] and (out / "logs.tar.gz").is_file()

    # A clock that goes a second further at every look makes the budget end in the seventh step after the
    # build; a stand-in for the interpreter lets one step fail and that one take longer than it may.
    program(
        folder,
        "date",
        f"""
echo x >>{folder}/ticks
wc -l <{folder}/ticks""",
    )
    program(
        folder,
        "python3",
        f"""
case "$*" in
  *"import xdist"*) exit 1 ;;
  *tests/gpu/test_pursuit_gpu.py*) echo "2 failed, 3 passed"; exit 1 ;;
  *gpu/pursuit.py*) echo begun; exec sleep 30 ;;
  *gpu/sae.py*) echo fast; exit 0 ;;
  *summary.py*) exec {sys.executable} "$@" ;;
  *) exit 0 ;;
esac""",
    )
    second = gpu_check(folder, "all", PYTHON="python3", OUT=str(out), BUDGET="20")
    assert second.returncode == 1
    steps = {s["name"]: s for s in json.loads((out / "summary.json").read_text(encoding="utf-8"))["steps"]}
    assert steps["build"]["verdict"] == steps["test_sae_gpu"]["verdict"] == "ok"
    assert steps["test_pursuit_gpu"]["verdict"] == "failed (1)"
    assert steps["test_pursuit_gpu"]["last_line"] == "2 failed, 3 passed"
    order = [name for name in steps if name.startswith("bench")]
    assert order == [f"bench-{b}--compact" for b in ("sae", "decoder_7b_b1", "pursuit", "decoder_7b_b16")]
    assert steps["bench-pursuit--compact"]["verdict"] == "cut off"
    assert steps["bench-decoder_7b_b16--compact"]["verdict"] == "not begun"
    assert len(list(out.iterdir())) <= 8

    third = gpu_check(folder, "test", PYTHON="python3")
    assert third.returncode == 1 and "nothing is built" in third.stderr
    gpu_check(folder, "clean", PYTHON="python3")
    assert not (folder / "build" / "gpu" / "state").exists()


def report(name: str, *, finished: bool, passed: bool) -> dict[str, object]:
    row = {
        "case": "SteerSae topk", "shape": {"T": 1, "m": 9}, "dtype": "bf16", "median_ms": 0.0365,
        "floor_ms": 0.0286, "percent_of_floor": 78.4, "baseline": None, "ratio": None, "extra": {"us": 36.5},
        "check": {"passed": passed, "detail": "looked at"},
    }  # fmt: skip
    target = {"name": "topk bf16, T = 1", "goal": "≤ 1.25 × floor", "found": "1.28 × floor", "met": False}
    return {"benchmark": name, "finished": finished, "rows": [row], "targets": [target] if finished else []}


def test_the_summary_shows_cases_goals_and_what_was_cut_short(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "bench-sae.log").write_text("...\nwrote somewhere\n\n")
    (tmp_path / "steps.tsv").write_text("bench-sae\tcut off\t90\nbench-sae\tok\t44\nbench-b\tnot begun\t0\n")
    for name, finished, passed in (("gpu_sae", True, True), ("gpu_pursuit", False, False)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report(name, finished=finished, passed=passed)))
    done = subprocess.run(
        [sys.executable, str(SUMMARY), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert found["format"] == "daco_rt.gpu_check" and found["commit"] and found["device"]
    assert [(s["name"], s["verdict"], s["seconds"], s["last_line"]) for s in found["steps"]] == [
        ("bench-sae", "ok", 44, "wrote somewhere"),
        ("bench-b", "not begun", 0, ""),
    ]
    sae, pursuit = (
        next(b for b in found["benchmarks"] if b["benchmark"] == n) for n in ("gpu_sae", "gpu_pursuit")
    )
    assert sae["finished"] and not sae["wrong"] and len(pursuit["wrong"]) == 1
    for text in ("36.5", "28.6", "MISSED", "WRONG", "gpu_pursuit was cut short after 1 cases"):
        assert text in done.stdout, text


def test_a_report_is_whole_after_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a benchmark has measured is on disk before the next case begins."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import harness

    monkeypatch.setenv("DACO_RT_COMMIT", "0123456789ab")
    row = harness.Row("case", {"T": 1}, "bf16", 1, 1.0, 1.0, 1.0, 3, None, None, None, None, None, None, None,
                      harness.Check(True, "looked at"))  # fmt: skip
    made = harness.Report("gpu_sae", False, {})
    output = tmp_path / "report.json"
    for count in (1, 2):
        made.add(row, output)
        written = json.loads(output.read_text(encoding="utf-8"))
        assert len(written["rows"]) == count and not written["finished"]
        assert written["machine"]["busy_after"] is None and written["commit"] == "0123456789ab"
    assert made.finish(output) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["finished"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
