"""What the benchmarks share: paired timing, measured bandwidth, the report and its table.

A figure counts only beside others of the same run. So functions are timed in turns (A B A B …) and compared
pair by pair, and the floor of a row is its bytes over the bandwidth that a plain one-pass sum of as many bytes
reached in the same rounds.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FORMAT, VERSION = "daco_rt.benchmark", 1
ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16")
_SETTLE_S = 0.002
"""Pause before each measured call: worker threads of the call before it stop spinning meanwhile."""


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
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "benchmark": self.benchmark,
            "quick": self.quick,
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine() | {"load_before": self.load_before, "load_after": os.getloadavg()[0]},
            "versions": versions(),
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "targets": [asdict(target) for target in self.targets],
        }

    def finish(self, output: Path) -> int:
        """Print the table and the targets, write the JSON, and return the exit status: 1 if a check failed."""
        print_rows(self.rows)
        if self.targets:
            print()
            marks = {True: "met", False: "MISSED", None: "not measured"}
            print_table(
                ("target", "goal", "found", ""),
                [(target.name, target.goal, target.found, marks[target.met]) for target in self.targets],
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
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
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds: does it run at all?")
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
    if not parsed.quick and os.getloadavg()[0] > 0.5:
        print(f"note: the machine is busy (load {os.getloadavg()[0]:.1f}); these figures do not count")
    return parsed


# ---- where and with what


def machine() -> dict[str, Any]:
    """CPU, cores, instruction sets and caches; nothing that names the machine or a place on it."""
    model, flags = platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": cores(),
        "flags": [flag for flag in ISA_FLAGS if flag in flags],
        "last_level_cache_bytes": last_level_cache(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(int(text.rstrip("KMG")) * units.get(text[-1], 1))
    return max(found[1:] or found)


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that a figure depends on, and of the native build."""
    found = {"python": platform.python_version()}
    for name in ("daco-rt", "numpy", "torch", "onnxruntime", "onnxscript", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    from daco_rt._native import build_info

    built = build_info()
    return found | {"native_commit": built["commit"], "compiler": built["compiler"], "isa": built["best_isa"]}


def commit() -> str:
    """The repository's commit, with ``-dirty`` if files differ from it; "unknown" outside a repository."""
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


# ---- timing


def in_turns(
    functions: Mapping[str, Callable[[int], object]],
    *,
    seconds: float,
    least: int = 5,
    most: int = 30,
    before: Callable[[], object] | None = None,
) -> dict[str, np.ndarray]:
    """Time functions in turns, A B A B …, and return each one's seconds, round by round.

    Parameters
    ----------
    functions : name → function of the round's number, by which it picks its buffers. One round is run first
        and thrown away.
    seconds : stop after about this long, but not before ``least`` rounds nor after ``most``.
    before : called, untimed, before each call; by default the machine just settles.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    for turn in range(most + 1):
        for name, function in functions.items():
            if before is not None:
                before()
            time.sleep(_SETTLE_S)
            start = time.perf_counter()
            function(turn)
            times[name].append(time.perf_counter() - start)
        if turn >= least and time.perf_counter() - began > seconds:
            break
    return {name: np.array(spent[1:]) for name, spent in times.items()}


class Reader:
    """Reads memory once and adds it up, as fast as plain library code does: the floor of everything here.

    Successive reads take different stretches of a pool larger than the last-level cache. Two ways of adding
    are tried for each number of threads, and the faster one is kept.
    """

    def __init__(self, largest: int) -> None:
        import torch

        count = max(int(1.25 * last_level_cache()), 2 * largest) // 4
        self.pool = torch.ones(count)
        self._at = 0
        self._way: dict[int, str] = {}

    def read(self, nbytes: int, threads: int) -> None:
        """Sum ``nbytes`` of the pool with so many threads."""
        self._sum(self._next(nbytes), self.way(threads))

    def evict(self) -> None:
        """Read the whole pool, after which no cache holds what was used before."""
        self.pool.sum()

    def way(self, threads: int) -> str:
        """How reads with so many threads are done: "sum" or "dot" (of the two halves)."""
        import torch

        torch.set_num_threads(threads)
        if threads not in self._way:
            probe = self.pool.numel() * 4 // 2
            times = in_turns(
                {way: lambda _, w=way: self._sum(self._next(probe), w) for way in ("sum", "dot")},
                seconds=1.0,
                most=5,
            )
            self._way[threads] = min(times, key=lambda way: float(np.median(times[way])))
        return self._way[threads]

    def _next(self, nbytes: int) -> Any:
        count = nbytes // 4
        if self._at + count > self.pool.numel():
            self._at = 0
        self._at += count
        return self.pool[self._at - count : self._at]

    @staticmethod
    def _sum(part: Any, way: str) -> None:
        import torch

        if way == "sum":
            part.sum()
        else:
            half = part.numel() // 2
            torch.dot(part[:half], part[half : 2 * half])


def copies_for(nbytes: int) -> int:
    """How many copies of a buffer it takes so that going round them leaves none of it in a cache."""
    return max(2, -(-int(1.25 * last_level_cache()) // nbytes))


def spread(seconds: np.ndarray) -> dict[str, Any]:
    """The fields of a row that describe a sample of times."""
    low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9)) * 1e3
    return {
        "median_ms": float(middle),
        "p10_ms": float(low),
        "p90_ms": float(high),
        "samples": len(seconds),
    }


def against(mine: np.ndarray, other: np.ndarray) -> float:
    """How many times longer the other took, the median over the pairs."""
    return float(np.median(other / mine))


# ---- tables


def print_rows(rows: Sequence[Row]) -> None:
    """Print measurements, one a line."""

    def number(value: float | None, digits: int = 2, unit: str = "") -> str:
        return "" if value is None else f"{value:.{digits}f}{unit}"

    print_table(
        ("case", "shape", "dtype", "thr", "median", "p10–p90 ms", "floor", "% floor", "baseline", "base ms",
         "ratio", "MB", "check"),
        [
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
                "ok" if row.check.passed else "WRONG",
            )
            for row in rows
        ],
    )  # fmt: skip


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their widest entry; numbers to the right."""
    widths = [max(len(line[i]) for line in (titles, *rows)) for i in range(len(titles))]
    for line in (titles, *rows):
        cells = (
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(line, widths, strict=True)
        )
        print("  ".join(cells).rstrip())
