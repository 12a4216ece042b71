"""SteerPursuit on a GPU: orthogonal matching pursuit of a decode batch and of a prompt.

    python benchmarks/gpu/pursuit.py             # about four minutes, 12 GB of GPU memory
    python benchmarks/gpu/pursuit.py --compact   # about a minute
    python benchmarks/gpu/pursuit.py --quick     # runs on the CPU too

Rows of bf16 over a bf16 dictionary with an fp16 Gram matrix, captured in a CUDA graph; each call of a
replay has another dictionary and Gram matrix, as the steered blocks of a decoder have. Floor: one read of
the dictionary at the measured copy bandwidth, or the operations of E z at the measured speed of a bf16
product, whichever takes longer; the chain of k dependent steps is not in it. Baselines: the same in plain
torch, and orthogonal-matching-pursuit-gpu (v0, Gram given) if it is installed. Every size of the cluster of
blocks that shares a row is timed beside the one that is chosen (``cluster_1_us`` …), and the chosen one and a
single block are compared bit for bit.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import measure
import numpy as np
import torch

# isort: split
import baselines
from harness import Check, Report, Row, Target, arguments
from references import check_pursuit, pursuit_residuals
from timing import against, spread
from workloads import SLOT, coherence, coherent_dictionary, mixtures, removing_policy

import daco_rt.ops as ops

PEER = "orthogonal-matching-pursuit-gpu v0"
CLUSTER = "DACO_RT_CUDA_CLUSTER"
CLUSTERS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Size:
    """How large the problem is and how often it is timed."""

    atoms: int
    dim: int
    k: int
    rows: tuple[int, ...]
    copies: int
    rounds: int
    judged: int
    plain_rows: int
    """Most rows that the plain baselines are given: they hold k rows of the Gram matrix a row."""


FULL = Size(15_000, 4_096, 32, (1, 2, 4, 8, 16, 32, 64, 2_048), 3, 40, 3, 2_048)
COMPACT = replace(FULL, rows=(1, 16, 64, 2_048), rounds=12)
QUICK = Size(520, 128, 6, (1, 5), 2, 3, 2, 5)


class Problem:
    """Dictionaries, their Gram matrices, rows and tables, on the device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        atoms = coherent_dictionary(size.atoms, size.dim)
        rows = torch.from_numpy(mixtures(atoms, max(size.rows))).bfloat16()
        self.rows = rows.float().numpy()
        self.atoms_host = atoms
        self.coherence = coherence(atoms)
        self.norm = float(np.median(np.linalg.norm(self.rows, axis=1)))
        self.tables = removing_policy(atoms, self.norm)
        self.best = pursuit_residuals(self.rows[: size.judged], atoms, size.k)
        self.z = rows.to(device)
        self.slots = torch.full((len(rows),), SLOT, dtype=torch.int32, device=device)
        self.operands = {name: torch.from_numpy(a).to(device) for name, a in self.tables.operands().items()}
        self.bias = torch.zeros(size.atoms, device=device)
        # Every value of the dictionary is exact in bf16.
        first = torch.from_numpy(atoms).to(device).bfloat16()
        gram = ops.build_gram(first, first, torch.float16)
        self.atoms = [first] + [first.clone() for _ in range(size.copies - 1)]
        self.grams = [gram] + [gram.clone() for _ in range(size.copies - 1)]

    def call(self, rows: int, copy: int) -> Any:
        """Steer the first rows by one of the dictionaries."""
        e, k = self.atoms[copy], self.size.k
        return ops.steer_pursuit(
            self.z[:rows],
            self.slots[:rows],
            e,
            self.bias,
            e,
            gram=self.grams[copy],
            k=k,
            k_out=k,
            **self.operands,
        )

    def replay(self, rows: int) -> measure.Replay:
        """One call with every dictionary."""
        calls = [lambda c=copy: self.call(rows, c) for copy in range(self.size.copies)]
        return measure.Replay(calls, self.device)

    def plain(self, rows: int) -> measure.Replay:
        """The same in plain torch, fp32, which waits for the device inside its solver."""
        wide = self.atoms[0].float()
        edit = baselines.Edit(
            self.operands["gain"][SLOT], self.operands["shift"][SLOT], float(self.tables.limits[SLOT, 0]),
            wide.norm(dim=1),
        )  # fmt: skip
        z = self.z[:rows].float()

        def pursue() -> object:
            with self.device:
                return baselines.pursuit(z, wide, self.grams[0], edit, self.size.k)

        return measure.Replay([pursue], self.device, capture=False)

    def peer(self, rows: int) -> measure.Replay | None:
        """The published package, with its Gram matrix given, or None where it is not installed."""
        try:
            from orthogonal_matching_pursuit_gpu import omp_v0
        except ImportError:
            return None
        wide = self.atoms[0].float()
        columns, z, gram = wide.T.contiguous(), self.z[:rows].float(), self.grams[0].float()
        k = self.size.k
        return measure.Replay(
            [lambda: omp_v0(columns, z, gram, n_nonzero_coefs=k)], self.device, capture=False
        )


@contextmanager
def cluster_of(size: int) -> Iterator[None]:
    """Force the number of blocks that share a row."""
    before = os.environ.get(CLUSTER)
    os.environ[CLUSTER] = str(size)
    try:
        yield
    finally:
        if before is None:
            del os.environ[CLUSTER]
        else:
            os.environ[CLUSTER] = before


def judge(problem: Problem, rows: int) -> Check:
    """Hold the first rows' codes and doses against float64, and a block a row against the rest."""
    result = problem.call(rows, 0)
    out, doses, index, value = (
        x.float().cpu().numpy() if x.is_floating_point() else x.cpu().numpy() for x in result
    )
    few = min(rows, 16)
    check = check_pursuit(
        None, doses[:few], index[:few], value[:few], problem.rows[:few], problem.atoms_host, problem.tables,
        problem.best,
    )  # fmt: skip
    with cluster_of(1):
        alone = problem.call(rows, 0)
    same = all(torch.equal(a, b) for a, b in zip(result, alone, strict=True))
    finite = bool(np.isfinite(out).all())
    return Check(
        check.passed and same and finite,
        f"{check.detail}; a block a row gives {'the same bits' if same else 'OTHER BITS'}",
    )


def product_speed(problem: Problem) -> float:
    """Operations a second of a large bf16 product of matrices by torch."""
    n = 8192 if measure.on_gpu(problem.device) else 256
    a = torch.randn(n, n, device=problem.device).bfloat16()
    b = torch.randn(n, n, device=problem.device).bfloat16()
    times = measure.in_turns({"mm": measure.Replay([lambda: a @ b], problem.device)}, rounds=5)["mm"]
    return 2.0 * n**3 / float(np.median(times))


@torch.inference_mode()
def rows_of(problem: Problem, bandwidth: float, speed: float) -> Iterator[Row]:
    """Yield a row for every number of rows; results are checked before they are timed."""
    size = problem.size
    for rows in size.rows:
        check = judge(problem, rows)
        replays = {"ours": problem.replay(rows)}
        if rows <= size.plain_rows:
            replays["plain"] = problem.plain(rows)
        peer = problem.peer(rows)
        if peer is not None:
            replays["peer"] = peer
        # The captured launches keep the size that was asked for while they were captured.
        for cluster in CLUSTERS if measure.on_gpu(problem.device) else ():
            try:
                with cluster_of(cluster):
                    replays[f"cluster {cluster}"] = problem.replay(rows)
            except RuntimeError as error:  # a device may have no room for the largest
                print(f"  T={rows}, a cluster of {cluster}: {error}", file=sys.stderr, flush=True)
        # A prompt's baselines take seconds each.
        times = measure.in_turns(replays, rounds=size.rounds if rows <= 64 else min(size.rounds, 8))
        nbytes = size.atoms * size.dim * 2
        floor = max(nbytes / bandwidth, 2.0 * rows * size.atoms * size.dim / speed)
        baseline = PEER if "peer" in times else "torch fp32 omp"
        other = times.get("peer", times.get("plain", times["ours"]))
        row = Row(
            case="SteerPursuit omp",
            shape={"T": rows, "m": size.atoms, "d": size.dim, "k": size.k},
            dtype="bf16",
            threads=1,
            **spread(times["ours"]),
            floor_ms=floor * 1e3,
            floor_bytes=nbytes,
            percent_of_floor=100 * floor / float(np.median(times["ours"])),
            baseline=baseline,
            baseline_ms=float(np.median(other)) * 1e3,
            ratio=against(times["ours"], other),
            peak_memory_mb=measure.peak_memory_mb(problem.device),
            check=check,
            extra={
                "us": float(np.median(times["ours"])) * 1e6,
                "torch_ratio": against(times["ours"], times["plain"]) if "plain" in times else 0.0,
            }
            | {
                f"cluster_{cluster}_us": float(np.median(times[f"cluster {cluster}"])) * 1e6
                for cluster in CLUSTERS
                if f"cluster {cluster}" in times
            },
        )
        print(f"  T={rows}: {row.extra['us']:.1f} µs", file=sys.stderr, flush=True)
        yield row


def targets(rows: list[Row]) -> list[Target]:
    """Hold the rows against the goals."""

    def goal(name: str, bound: float, unit: str, value: float | None, *, at_least: bool = False) -> Target:
        met = None if value is None else value >= bound if at_least else value <= bound
        found = "" if value is None else f"{value:.1f} {unit}"
        return Target(name, f"{'≥' if at_least else '≤'} {bound:g} {unit}", found, met)

    by_rows = {row.shape["T"]: row for row in rows}

    def micros(t: int) -> float | None:
        return by_rows[t].median_ms * 1e3 if t in by_rows else None

    def ratio(t: int) -> float | None:
        return by_rows[t].ratio if t in by_rows and by_rows[t].baseline == PEER else None

    few = [ratio(t) for t in by_rows if t <= 64]
    slowest = min((r for r in few if r is not None), default=None)
    return [
        goal("omp, T = 1", 80, "µs", micros(1)),
        goal("omp, T = 64", 120, "µs", micros(64)),
        goal("omp, T = 2,048", 1500, "µs", micros(2048)),
        goal(f"faster than {PEER}, T ≤ 64", 20, "×", slowest, at_least=True),
        goal(f"faster than {PEER}, T = 2,048", 5, "×", ratio(2048), at_least=True),
    ]


def main() -> int:
    options = arguments(__doc__, "gpu_pursuit", measure.add_options)
    device = torch.device(options.device)
    size = QUICK if options.quick else COMPACT if options.compact else FULL
    bandwidth = measure.copy_bandwidth(device)
    problem = Problem(size, device)
    speed = product_speed(problem)
    settings: dict[str, Any] = {
        "threads": [1],
        **measure.describe(device),
        "activations": "bf16",
        "gram": "fp16",
        "floor": "one read of the dictionary at the copy bandwidth, or E z at the speed of a bf16 product",
        "copy_gb_s": round(bandwidth / 1e9, 1),
        "product_tflops": round(speed / 1e12, 1),
        "dictionary": problem.coherence,
        "rotated_dictionaries": size.copies,
    }
    report = Report("gpu_pursuit", options.quick, settings, shown=("us", "torch_ratio"))
    for row in rows_of(problem, bandwidth, speed):
        report.add(row, options.output)
    if not options.quick:
        report.targets = targets(report.rows)
    return report.finish(options.output)


if __name__ == "__main__":
    sys.exit(main())
