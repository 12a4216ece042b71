"""What gpu_check.sh has found so far, as a table and as summary.json.

    python benchmarks/gpu/summary.py build/gpu

Reads ``steps.tsv`` (name, verdict, seconds; the last line of a name counts), the last line of each step's log
and the reports ``gpu_*.json``. Needs nothing but Python, so that it works where the build failed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import commit, print_table

FORMAT, VERSION = "daco_rt.gpu_check", 1


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Every step that was tried, in the order of its first try, with the last line that it wrote."""
    steps: dict[str, dict[str, Any]] = {}
    table = folder / "steps.tsv"
    for line in table.read_text(encoding="utf-8").splitlines() if table.is_file() else ():
        name, verdict, seconds = line.split("\t")
        steps[name] = {"name": name, "verdict": verdict, "seconds": int(seconds), "last_line": ""}
        log = folder / "logs" / f"{name}.log"
        if verdict != "not begun" and log.is_file():
            written = [x.strip() for x in log.read_text(encoding="utf-8", errors="replace").splitlines()]
            steps[name]["last_line"] = next((x.strip("= ") for x in reversed(written) if x.strip("= ")), "")
    return list(steps.values())


def reports_of(folder: Path) -> list[dict[str, Any]]:
    """The benchmarks' reports, by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu_*.json"))]


def device() -> str:
    """Name, memory and driver of the first GPU, or "none"."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return lines[0] if lines else "none"


def measured(report: dict[str, Any]) -> dict[str, Any]:
    """One line of what a benchmark measured."""
    rows = report["rows"]
    return {
        "benchmark": report["benchmark"],
        "finished": report["finished"],
        "cases": len(rows),
        "wrong": [
            f"{row['case']}, {row['dtype']}, {row['shape']}" for row in rows if not row["check"]["passed"]
        ],
        "targets": report["targets"],
    }


def summary(folder: Path) -> dict[str, Any]:
    """Everything as plain JSON values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "device": device(),
        "steps": steps_of(folder),
        "benchmarks": [measured(report) for report in reports_of(folder)],
    }


def show(found: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    """Print steps, every case's time, and goals."""
    print(f"commit {found['commit']}, {found['date']}, device {found['device']}\n")
    print_table(
        ("step", "verdict", "s", "last line"),
        [(s["name"], s["verdict"], str(s["seconds"]), s["last_line"][:100]) for s in found["steps"]],
    )
    cases = []
    for report in reports:
        for row in report["rows"]:
            extra = row["extra"].get("extra_us")
            cases.append(
                (
                    row["case"], " ".join(f"{k}={v}" for k, v in row["shape"].items()), row["dtype"],
                    f"{row['median_ms'] * 1e3:.1f}", f"{row['floor_ms'] * 1e3:.1f}",
                    f"{row['percent_of_floor']:.0f}", row["baseline"] or "",
                    "" if row["ratio"] is None else f"{row['ratio']:.2f}",
                    "" if extra is None else f"{extra:+.1f}", "ok" if row["check"]["passed"] else "WRONG",
                )
            )  # fmt: skip
    if cases:
        print()
        titles = (
            "case",
            "shape",
            "dtype",
            "µs",
            "floor µs",
            "% floor",
            "baseline",
            "ratio",
            "extra µs",
            "check",
        )
        print_table(titles, cases)
    goals = [
        target for part in found["benchmarks"] for target in part["targets"] if target["met"] is not None
    ]
    if goals:
        print()
        print_table(
            ("target", "goal", "found", ""),
            [(t["name"], t["goal"], t["found"], "met" if t["met"] else "MISSED") for t in goals],
        )
    for part in found["benchmarks"]:
        if not part["finished"]:
            print(f"\n{part['benchmark']} was cut short after {part['cases']} cases")


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python benchmarks/gpu/summary.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    found = summary(folder)
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found, reports_of(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
