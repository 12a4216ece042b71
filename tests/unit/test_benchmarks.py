"""The benchmarks run, and their reports hold what a reader needs to judge them. No test looks at a time."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from daco_rt.errors import DacoError

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
CASES = {
    "operator_cpu": {
        *(f"SteerSae {coder} ({host})" for coder in ("topk", "relu") for host in ("numpy", "torch")),
        "SteerPursuit omp (numpy)",
        "SteerPursuit omp (torch)",
    },
    "smol_steered": {
        "policy off",
        "default pack, omp",
        "synthetic pack, topk",
        "synthetic pack, omp",
    },
    "harvest_rate": {"harvest of one shard", "sums of one stimulus on the host"},
    "export_memory": {
        "export, in place",
        "export, in place, file not cached",
        "export, converting fp32 to fp16",
    },
    "retrieval": {"nearest pairs"},
    "evaluate_rate": {"answers, policy off", "answers, policy default"},
}
NAMES = tuple(CASES)

REPORT = {
    "format": str, "version": int, "benchmark": str, "quick": bool, "finished": bool, "commit": str,
    "date": str, "machine": dict, "versions": dict, "settings": dict, "rows": list, "targets": list,
}  # fmt: skip
MACHINE = {"cpu": str, "cores": int, "flags": list, "last_level_cache_bytes": int, "memory_bytes": int,
           "system": str, "busy_before": float, "busy_after": float}  # fmt: skip
NUMBER = (int, float)
OPTIONAL = (int, float, type(None))
ROW = {
    "case": str, "shape": dict, "dtype": str, "threads": int, "median_ms": NUMBER, "p10_ms": NUMBER,
    "p90_ms": NUMBER, "samples": int, "floor_ms": OPTIONAL, "floor_bytes": OPTIONAL,
    "percent_of_floor": OPTIONAL, "baseline": str, "baseline_ms": NUMBER, "ratio": NUMBER,
    "peak_memory_mb": OPTIONAL, "check": dict, "extra": dict,
}  # fmt: skip


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import the benchmarks' own modules, which stand beside the scripts, and forget them afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


def matches(value: dict[str, Any], fields: dict[str, Any]) -> None:
    assert set(value) == set(fields)
    for name, kind in fields.items():
        assert isinstance(value[name], kind), f"{name}: {value[name]!r}"


@pytest.fixture(scope="module")
def native() -> None:
    from daco_rt._native import build_info, library_path

    try:
        build_info()
        library_path("torch")
        library_path("onnxruntime")
    except DacoError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_quick_run_writes_a_report(name: str, tmp_path: Path, native: None):
    output = tmp_path / "folder" / "report.json"
    before = sorted((BENCHMARKS / "results").glob("*"))
    done = run(name, "--quick", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((BENCHMARKS / "results").glob("*")) == before

    text = output.read_text(encoding="utf-8")
    report = json.loads(text)
    matches(report, REPORT)
    matches(report["machine"], MACHINE)
    assert (report["format"], report["benchmark"], report["quick"]) == ("daco_rt.benchmark", name, True)
    assert report["settings"]["threads"] and report["finished"]
    assert {"python", "daco-rt", "numpy", "native_commit", "isa"} <= set(report["versions"])
    assert str(ROOT) not in text and str(tmp_path) not in text and str(Path.home()) not in text

    assert {row["case"] for row in report["rows"]} == CASES[name]
    for row in report["rows"]:
        matches(row, ROW)
        matches(row["check"], {"passed": bool, "detail": str})
        assert row["check"]["passed"] and row["check"]["detail"], row["case"]
        assert row["samples"] >= 1 and row["threads"] >= 1
        numbers = [v for v in (*row.values(), *row["extra"].values()) if isinstance(v, float)]
        assert all(math.isfinite(v) for v in numbers), row["case"]
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert all(isinstance(v, int) for v in row["shape"].values())
        # The table shows every row and its shape.
        assert row["case"] in done.stdout and row["baseline"] in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_help_says_how_to_run_it(name: str):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/{name}.py" in done.stdout
    assert "--quick" in done.stdout and "--output" in done.stdout


@pytest.mark.parametrize("sparsity", ["topk", "l1"])
def test_the_start_of_an_sae_is_measured_with_either_sparsity(sparsity: str, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'figures')")
    (tmp_path / "texts.txt").write_text("".join(f"The {n}th of {n + 1} words is {n}.\n" for n in range(200)))
    output, figure = tmp_path / "report.json", tmp_path / "start.png"
    done = run(
        "sae_start", "--model", "pocket-internvl", "--block", "3", "--steps", "50", "--batch", "64",
        "--seeds", "0", "--k", "5", "--sparsity", sparsity, "--l1", "0.01",
        "--texts", str(tmp_path / "texts.txt"), "--work", str(tmp_path / "work"),
        "--figure", str(figure), "--output", str(output),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert isinstance(report["commit"], str) and figure.is_file()
    assert {"cpu", "cores", "flags", "memory_bytes", "threads"} <= set(report["machine"])
    assert str(tmp_path) not in output.read_text()
    assert report["settings"]["sparsity"] == sparsity
    assert [row["init"] for row in report["rows"]] == ["dictionary", "random"]
    for row in report["rows"]:
        assert (row["codes"] <= 5) == (sparsity == "topk")
        assert (row["jumprelu_loss"] is None) == (sparsity == "l1")


def test_every_script_that_writes_a_report_says_commit_and_machine():
    for script in BENCHMARKS.glob("*.py"):
        text = script.read_text(encoding="utf-8")
        if '"benchmark": ' in text:
            assert '"commit": commit()' in text and '"machine": machine()' in text, script.name


def test_a_wrong_result_is_reported(load: Callable[[str], ModuleType]):
    """The check that stands before the timing must be able to fail."""
    import numpy as np

    from daco_rt.ops import reference

    workloads, references = load("workloads"), load("references")
    atoms = workloads.coherent_dictionary(300, 64)
    z = workloads.mixtures(atoms, 3)
    tables = workloads.removing_policy(atoms, float(np.linalg.norm(z[0])))
    bias = np.zeros(300, np.float32)
    expected = references.expect_sae(z, atoms, bias, atoms, tables, "topk", 8)
    assert references.check_rows(expected.z, expected.doses, z, expected).passed
    assert not references.check_rows(z, expected.doses, z, expected).passed
    assert not references.check_rows(expected.z, expected.doses + 1e-2, z, expected).passed

    # A pursuit of fewer steps leaves more of the row than the reference's does.
    best = references.pursuit_residuals(z, atoms, 8)
    for k in (8, 7):
        slots = np.full(3, workloads.SLOT)
        out = reference.steer_pursuit(z, slots, atoms, bias, atoms, k=k, k_out=8, **tables.operands())
        check = references.check_pursuit(*out, z, atoms, tables, best)
        assert check.passed == (k == 8), check.detail


def test_dictionaries_are_coherent_and_exact_in_every_dtype(load: Callable[[str], ModuleType]):
    import ml_dtypes
    import numpy as np

    workloads = load("workloads")
    atoms = workloads.coherent_dictionary(15_000, 192)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert np.array_equal(atoms.astype(dtype).astype(np.float32), atoms)
    found = workloads.coherence(atoms)
    assert found["mean_abs_cos"] == pytest.approx(0.13, abs=0.02)
    assert found["nearest_neighbour_cos"] == pytest.approx(0.45, abs=0.06)
    assert np.linalg.norm(atoms, axis=1) == pytest.approx(1, abs=5e-3)
