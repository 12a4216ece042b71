"""What the benchmarks share: command line, machine, report and table.

The report is meant to be judged by somebody who was not there: it says where, with what and how busy.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from daco_rt._machine import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FORMAT, VERSION = "daco_rt.benchmark", 1


@dataclass(frozen=True)
class Check:
    """Whether a result was right, looked at before it was timed."""

    passed: bool
    detail: str


@dataclass
class Row:
    """One measurement. Times are milliseconds a call; a field that has no meaning for the row is ``None``."""

    case: str
    shape: dict[str, int]
    dtype: str
    threads: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    samples: int
    floor_ms: float | None
    floor_bytes: int | None
    percent_of_floor: float | None
    baseline: str | None
    baseline_ms: float | None
    ratio: float | None
    """Baseline over this row: above 1 this row is faster."""
    peak_memory_mb: float | None
    check: Check
    extra: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A goal and what was found; ``met`` is ``None`` where the run did not measure it."""

    name: str
    goal: str
    found: str
    met: bool | None


@dataclass
class Report:
    """Everything a benchmark found, with what is needed to judge it."""

    benchmark: str
    quick: bool
    settings: dict[str, Any]
    shown: tuple[str, ...] = ()
    """Keys of a row's ``extra`` that its line in the table shows."""
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    busy_before: float = field(default_factory=lambda: busy_cores())
    busy_after: float | None = None
    """Measured at the end: a report without it is of a run that was cut short."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "benchmark": self.benchmark,
            "quick": self.quick,
            "finished": self.busy_after is not None,
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine() | {"busy_before": self.busy_before, "busy_after": self.busy_after},
            "versions": versions(),
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "targets": [asdict(target) for target in self.targets],
        }

    def add(self, row: Row, output: Path) -> None:
        """Take a measurement and write what there is, so that a run that is cut short loses nothing."""
        self.rows.append(row)
        self.write(output)

    def write(self, output: Path) -> None:
        """Write the JSON, whole or not at all."""
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(output.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.replace(output)

    def finish(self, output: Path) -> int:
        """Print table and targets, write the JSON, and return the exit status: 1 if a check failed."""
        if self.rows:
            print_rows(self.rows, self.shown)
        if self.targets:
            print()
            marks = {True: "met", False: "MISSED", None: "not measured"}
            print_table(
                ("target", "goal", "found", ""),
                [(target.name, target.goal, target.found, marks[target.met]) for target in self.targets],
            )
        self.busy_after = busy_cores()
        self.write(output)
        print(f"\nwrote {output}")
        wrong = [row for row in self.rows if not row.check.passed]
        for row in wrong:
            print(f"WRONG: {row.case}, {row.dtype}, {row.shape}: {row.check.detail}", file=sys.stderr)
        return 1 if wrong else 0


# ---- the command line


def arguments(
    description: str | None, name: str, add: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """Parse the options that every benchmark has; ``add`` may declare more."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, a few seconds: does it run at all?"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"where the JSON goes (default: benchmarks/results/{name}.json; with --quick nowhere near it)",
    )
    if add is not None:
        add(parser)
    parsed = parser.parse_args()
    if parsed.output is None:
        # A smoke run must not replace what was measured.
        parsed.output = ROOT / "build" / f"{name}-quick.json" if parsed.quick else RESULTS / f"{name}.json"
    if not parsed.quick and (busy := busy_cores()) > 0.2:
        print(f"note: others keep {busy:.1f} cores busy; these figures do not count", flush=True)
    return parsed


# ---- where and with what


def busy_cores(seconds: float = 0.5) -> float:
    """How many cores are at work while this process sleeps; 0 where the system does not say."""

    def ticks() -> tuple[int, int]:
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    try:
        total, idle = ticks()
        time.sleep(seconds)
        total_after, idle_after = ticks()
    except (OSError, ValueError):
        return 0.0
    share = 1 - (idle_after - idle) / max(1, total_after - total)
    return round(share * (os.cpu_count() or 1), 2)


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that a figure depends on, and of the native build."""
    found = {"python": platform.python_version()}
    for name in ("daco-rt", "numpy", "torch", "onnxruntime", "onnxscript", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    from daco_rt._native import build_info
    from daco_rt.errors import DacoError

    try:
        built = build_info()
    except DacoError:  # a build without the extension module still has the torch library
        return found
    return found | {"native_commit": built["commit"], "compiler": built["compiler"], "isa": built["best_isa"]}


def commit() -> str:
    """The repository's commit, with ``-dirty`` if files differ from it.

    Where the files were copied without their repository, DACO_RT_COMMIT may say it; else it is "unknown".
    """
    if given := os.environ.get("DACO_RT_COMMIT"):
        return given
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _git(*command: str) -> str:
    return subprocess.run(
        ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def resident_mb() -> float:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def return_free_memory() -> None:
    """Give what the C allocator keeps back to the system, so that ``resident_mb`` shows what is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# ---- tables


def print_rows(rows: Sequence[Row], shown: Sequence[str] = ()) -> None:
    """Print measurements, one a line, with the named entries of ``extra`` at its end."""

    def number(value: float | None, digits: int = 2, unit: str = "") -> str:
        return "" if value is None else f"{value:.{digits}f}{unit}"

    titles = ("case", "shape", "dtype", "thr", "median ms", "p10–p90", "floor", "% floor", "baseline",
              "base ms", "ratio", "MB", *shown, "check")  # fmt: skip
    lines = []
    for row in rows:
        more = (row.extra.get(key) for key in shown)
        lines.append(
            (
                row.case,
                " ".join(f"{key}={value}" for key, value in row.shape.items()),
                row.dtype,
                str(row.threads),
                number(row.median_ms, 3),
                f"{row.p10_ms:.2f}–{row.p90_ms:.2f}",
                number(row.floor_ms, 3),
                number(row.percent_of_floor, 0),
                row.baseline or "",
                number(row.baseline_ms, 3),
                number(row.ratio, 2, "×"),
                number(row.peak_memory_mb, 0),
                *(number(value) if isinstance(value, (int, float)) else value or "" for value in more),
                "ok" if row.check.passed else "WRONG",
            )
        )
    print_table(titles, lines)


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their widest entry; numbers to the right."""
    widths = [max(len(line[i]) for line in (titles, *rows)) for i in range(len(titles))]
    for line in (titles, *rows):
        cells = (
            cell.rjust(width) if cell.lstrip("-")[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(line, widths, strict=True)
        )
        print("  ".join(cells).rstrip())
