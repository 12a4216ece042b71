"""The steering operators on the CPU, against the floor and against plain torch.

    python benchmarks/operator_cpu.py            # about four minutes, 4 GB
    python benchmarks/operator_cpu.py --quick

SteerSae (topk, relu with a tenth of the latents watched) and SteerPursuit (omp) on coherent dictionaries, for
1, 8 and 64 rows, weights in fp32, bf16, fp16 (one row only: the rest is bf16's) and int8, one thread and
all. Floor: one read of the weights that the coder needs, in the same rounds, or its encoder's operations at
the speed of torch's fp32 product of matrices if that takes longer. Baseline: the same in torch fp32. Caches
are cold: each call gets another copy of the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import baselines
import ml_dtypes
import numpy as np
import torch
from harness import Check, Report, Row, Target, arguments
from references import Expected, check_pursuit, check_rows, expect_sae, pursuit_residuals
from timing import Reader, against, copies_for, in_turns, peak_flops, spread
from workloads import SLOT, coherence, coherent_dictionary, mixtures, removing_policy

import daco_rt.ops as torch_ops
from daco_rt._machine import cores
from daco_rt.ops import numpy as numpy_ops
from daco_rt.ops import quantise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
CODERS = ("topk", "relu", "omp")
ACTIVE = 64
"""Latents that fire on a row of the ReLU SAE, on average."""


@dataclass(frozen=True)
class Size:
    """How large the problem is and how long it is measured."""

    atoms: int
    dim: int
    k: int
    rows: tuple[int, ...]
    dtypes: tuple[str, ...]
    seconds: float
    rounds: int
    judged: int
    cold: bool


FULL = Size(15_000, 4_096, 32, (1, 8, 64), ("fp32", "bf16", "fp16", "int8"), 2.0, 25, 3, True)
QUICK = Size(700, 256, 8, (1, 4), ("fp32", "bf16", "int8"), 0.05, 3, 2, False)


class Problem:
    """The dictionary in as many copies as it takes to keep caches cold, rows, tables and expectations.

    A ``quantised`` problem is that of the dictionary that int8 weights stand for.
    """

    def __init__(self, size: Size, *, quantised: bool = False) -> None:
        self.size = size
        atoms = coherent_dictionary(size.atoms, size.dim)
        self.scales: np.ndarray | None = None
        if quantised:
            codes, scale = quantise(atoms, "int8")
            self.codes, self.scales = torch.from_numpy(codes), np.stack([scale, scale])
            atoms = codes * scale[:, None]
        self.z = mixtures(atoms, max(size.rows))
        self.norm = float(np.median(np.linalg.norm(self.z, axis=1)))
        self.tables = removing_policy(atoms, self.norm)
        self.slots = np.full(len(self.z), SLOT, np.int32)
        draw = np.random.default_rng(3)
        level = self._firing_level(atoms)
        self.bias = {
            "topk": (0.01 * self.norm * draw.standard_normal(size.atoms)).astype(np.float32),
            "relu": np.full(size.atoms, -level, np.float32),
            "omp": np.zeros(size.atoms, np.float32),
        }
        self.atoms = torch.from_numpy(atoms)
        self.coherence = coherence(atoms)
        self.gram = symmetric_gram(self.atoms)
        self.wide = [self.atoms.clone() for _ in range(self._count(atoms.nbytes))]
        self.expected = {
            coder: expect_sae(self.z, atoms, self.bias[coder], atoms, self.tables, coder, size.k)
            for coder in ("topk", "relu")
        }
        # Rows next to a cliff go last: with one row, that one must be fit to be compared.
        clear = np.logical_and.reduce([e.clear for e in self.expected.values()])
        order = np.argsort(~clear, kind="stable")
        self.z = self.z[order]
        self.expected = {coder: e.rows(order) for coder, e in self.expected.items()}
        self.residuals = pursuit_residuals(self.z[: size.judged], atoms, size.k)

    def copies(self, dtype: str) -> list[torch.Tensor]:
        """Copies of the dictionary, as many as keep the caches cold."""
        if dtype == "fp32":
            return self.wide
        narrow = self.codes if dtype == "int8" else self.atoms.to(DTYPES[dtype])
        return [narrow.clone() for _ in range(self._count(narrow.nbytes))]

    def floor_bytes(self, coder: str, dtype: str) -> int:
        """Bytes of weights that a call cannot do without."""
        atoms = len(self.tables.watched) if coder == "relu" else self.size.atoms
        return atoms * self.size.dim * DTYPES[dtype].itemsize

    def floor_operations(self, coder: str, rows: int) -> int:
        """Floating-point operations of the encoder."""
        atoms = len(self.tables.watched) if coder == "relu" else self.size.atoms
        return 2 * rows * atoms * self.size.dim

    def _count(self, nbytes: int) -> int:
        return copies_for(nbytes) if self.size.cold else 2

    def _firing_level(self, atoms: np.ndarray) -> float:
        before = self.z[:8] @ atoms.T
        return float(np.quantile(before, 1 - min(ACTIVE / self.size.atoms, 0.5)))


def symmetric_gram(atoms: torch.Tensor) -> torch.Tensor:
    """A Aᵀ in fp16, block by block: half the products, and no fp32 matrix of m x m."""
    torch.set_num_threads(cores())
    m, step = len(atoms), 1024
    gram = torch.empty(m, m, dtype=torch.float16)
    for i in range(0, m, step):
        block = (atoms[i : i + step] @ atoms[i:].T).half()
        gram[i : i + step, i:] = block
        gram[i:, i : i + step] = block.T
    return gram


def as_numpy(x: torch.Tensor) -> np.ndarray:
    """View a tensor as an array; bf16 as ``ml_dtypes.bfloat16``."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def ours(problem: Problem, coder: str, copies: list[Any], rows: int, **how: Any) -> Callable[[int], Any]:
    """The operator as a function of the round's number: on arrays, or on tensors through the torch op."""
    tensors = isinstance(copies[0], torch.Tensor)
    give: Callable[[np.ndarray], Any] = torch.from_numpy if tensors else lambda a: a
    ops: Any = torch_ops if tensors else numpy_ops
    z, slots = give(problem.z[:rows]), give(problem.slots[:rows])
    tables = {name: give(a) for name, a in problem.tables.operands().items()}
    if problem.scales is not None:
        tables["scales"] = give(problem.scales)
    bias, k = give(problem.bias[coder]), problem.size.k
    if coder == "omp":
        gram = problem.gram if tensors else problem.gram.numpy()

        def pursue(turn: int) -> Any:
            e = copies[turn % len(copies)]
            return ops.steer_pursuit(z, slots, e, bias, e, gram=gram, k=k, k_out=k, **tables, **how)

        return pursue

    def encode(turn: int) -> Any:
        # The decoder is another copy, so that its rows were not read a moment ago.
        e, d = copies[turn % len(copies)], copies[(turn + 1) % len(copies)]
        return ops.steer_sae(z, slots, e, bias, d, coder=coder, k=k, k_out=k, **tables, **how)

    return encode


def plain_torch(problem: Problem, coder: str, rows: int) -> Callable[[int], torch.Tensor]:
    """The baseline as a function of the round's number."""
    z, bias = torch.from_numpy(problem.z[:rows]), torch.from_numpy(problem.bias[coder])
    edit, k, wide = baselines.Edit.of(problem.tables, problem.atoms), problem.size.k, problem.wide
    if coder == "omp":
        return lambda turn: baselines.pursuit(z, wide[turn % len(wide)], problem.gram, edit, k)
    if coder == "topk":
        return lambda turn: baselines.topk(
            z, wide[turn % len(wide)], bias, wide[(turn + 1) % len(wide)], edit, k
        )
    watched = torch.from_numpy(problem.tables.watched)
    rows_of = [copy[watched] for copy in wide]
    return lambda turn: baselines.relu(
        z, wide[turn % len(wide)], bias, watched, rows_of[turn % len(wide)], edit
    )


def judge(problem: Problem, coder: str, result: Any, baseline: torch.Tensor) -> Check:
    """Hold a result against float64, and the baseline too: a wrong one is no baseline."""
    out, doses, index, value = (x.numpy() if isinstance(x, torch.Tensor) else x for x in result)
    z, tables = problem.z[: len(out)], problem.tables
    if coder == "omp":
        atoms = problem.atoms.numpy()
        check = check_pursuit(out, doses, index, value, z, atoms, tables, problem.residuals)
        same = out
    else:
        expected: Expected = problem.expected[coder].rows(slice(len(out)))
        check = check_rows(out, doses, z, expected)
        same = np.where(expected.clear[:, None], expected.z, out)
    apart = np.linalg.norm(baseline.numpy() - same, axis=1) / np.linalg.norm(z, axis=1)
    # Two pursuits on an fp16 Gram matrix may part ways on a row; the middle row tells whether they are alike.
    off = float(np.median(apart) if coder == "omp" else apart.max())
    bound = 1e-2 if coder == "omp" else 1e-4
    return Check(check.passed and off <= bound, f"{check.detail}; baseline {off:.1e} of |z| away")


def measure(problem: Problem, dtypes: Iterable[str], reader: Reader, peak: dict[int, float]) -> Iterator[Row]:
    """Yield a row a case; results are checked first, then timed in turns with floor and baseline."""
    size = problem.size
    for dtype in dtypes:
        tensors = problem.copies(dtype)
        arrays = [as_numpy(copy) for copy in tensors]
        for threads in sorted({1, cores()}):
            for coder in CODERS:
                for rows in size.rows if dtype != "fp16" else size.rows[:1]:
                    host = ours(problem, coder, arrays, rows, threads=threads)
                    yield timed(problem, reader, peak, coder, dtype, rows, threads, "numpy", host)
                if dtype == "bf16":
                    host = ours(problem, coder, tensors, 1)
                    yield timed(problem, reader, peak, coder, dtype, 1, threads, "torch", host)


@torch.inference_mode()
def timed(
    problem: Problem,
    reader: Reader,
    peak: dict[int, float],
    coder: str,
    dtype: str,
    rows: int,
    threads: int,
    host: str,
    function: Callable[[int], Any],
) -> Row:
    """Check one case and time it."""
    size = problem.size
    reader.way(threads)
    torch.set_num_threads(threads)
    baseline = plain_torch(problem, coder, rows)
    check = judge(problem, coder, function(0), baseline(0))
    nbytes = problem.floor_bytes(coder, dtype)
    functions = {
        "ours": function,
        "baseline": baseline,
        "floor": lambda _: reader.read(nbytes, threads),
    }
    times = in_turns(functions, seconds=size.seconds, least=min(5, size.rounds), most=size.rounds)
    computing = problem.floor_operations(coder, rows) / peak[threads]
    mine, floor = times["ours"], np.maximum(times["floor"], computing)
    name = "SteerPursuit omp" if coder == "omp" else f"SteerSae {coder}"
    watched = {"watched": len(problem.tables.watched)} if coder == "relu" else {"k": size.k}
    row = Row(
        case=f"{name} ({host})",
        shape={"T": rows, "m": size.atoms, "d": size.dim, **watched},
        dtype=dtype,
        threads=threads,
        **spread(mine),
        floor_ms=float(np.median(floor)) * 1e3,
        floor_bytes=nbytes,
        percent_of_floor=100 * against(mine, floor),
        baseline=f"torch fp32 {coder}",
        baseline_ms=float(np.median(times["baseline"])) * 1e3,
        ratio=against(mine, times["baseline"]),
        peak_memory_mb=None,
        check=check,
        extra={
            "ms_per_row": float(np.median(mine)) * 1e3 / rows,
            "floor_by": "flops" if computing > np.median(times["floor"]) else "bytes",
        },
    )
    print(f"  {row.case} {dtype} T={rows} threads={threads}: {row.median_ms:.3f} ms", file=sys.stderr)
    return row


def targets(rows: list[Row]) -> list[Target]:
    """Hold the rows against the goals of one thread."""

    def find(case: str, dtype: str, t: int) -> Row | None:
        wanted = (f"{case} (numpy)", dtype, t, 1)
        found = (r for r in rows if (r.case, r.dtype, r.shape["T"], r.threads) == wanted)
        return next(found, None)

    def goal(name: str, bound: float, value: float | None, *, at_least: bool) -> Target:
        sign = "≥" if at_least else "≤"
        met = None if value is None else value >= bound if at_least else value <= bound
        return Target(name, f"{sign} {bound:g} ×", "" if value is None else f"{value:.2f} ×", met)

    def over_floor(row: Row | None) -> float | None:
        return None if row is None or not row.percent_of_floor else 100 / row.percent_of_floor

    def faster(row: Row | None) -> float | None:
        return None if row is None else row.ratio

    def times(row: Row | None, other: Row | None) -> float | None:
        return None if row is None or other is None else row.median_ms / other.median_ms

    topk, relu, omp = "SteerSae topk", "SteerSae relu", "SteerPursuit omp"
    return [
        goal("omp T = 1 fp32, over the floor", 1.15, over_floor(find(omp, "fp32", 1)), at_least=False),
        goal("omp T = 1 bf16, over the floor", 1.25, over_floor(find(omp, "bf16", 1)), at_least=False),
        goal("omp T = 1 int8, over the floor", 1.4, over_floor(find(omp, "int8", 1)), at_least=False),
        goal("topk T = 1 bf16, over the floor", 1.25, over_floor(find(topk, "bf16", 1)), at_least=False),
        goal("topk T = 1 bf16, faster than torch fp32", 2.5, faster(find(topk, "bf16", 1)), at_least=True),
        goal("topk T = 1 int8, faster than torch fp32", 4.0, faster(find(topk, "int8", 1)), at_least=True),
        goal("topk T = 8 fp32, faster than torch fp32", 2.5, faster(find(topk, "fp32", 8)), at_least=True),
        goal("topk T = 8 bf16, faster than torch fp32", 2.5, faster(find(topk, "bf16", 8)), at_least=True),
        *(
            goal(f"relu T = 1 {dtype}, faster than topk", 8.0,
                 times(find(topk, dtype, 1), find(relu, dtype, 1)), at_least=True)
            for dtype in ("fp32", "bf16")
        ),
        goal("omp T = 64 fp32, over topk", 1.25, times(find(omp, "fp32", 64), find(topk, "fp32", 64)),
             at_least=False),
    ]  # fmt: skip


def main() -> int:
    options = arguments(__doc__, "operator_cpu")
    size = QUICK if options.quick else FULL
    print(f"threads: 1 and {cores()}; m = {size.atoms}, d = {size.dim}, k = {size.k}", flush=True)
    threads = sorted({1, cores()})
    settings: dict[str, Any] = {
        "threads": threads,
        "activations": "fp32",
        "gram": "fp16",
        "floor": "one-pass sum of as many bytes in the same rounds; flops at the peak of torch's fp32 mm",
    }
    report = Report("operator_cpu", options.quick, settings, shown=("floor_by",))
    reader = Reader(size.atoms * size.dim * 4, cold=size.cold)
    problem = Problem(size)
    peak = {n: peak_flops(n) for n in threads}
    settings |= {
        "dictionary": problem.coherence,
        "rotated_bytes": len(problem.wide) * problem.wide[0].nbytes,
        "peak_gflops": {str(n): round(flops / 1e9, 1) for n, flops in peak.items()},
    }
    report.rows.extend(measure(problem, [d for d in size.dtypes if d != "int8"], reader, peak))
    del problem
    report.rows.extend(measure(Problem(size, quantised=True), ["int8"], reader, peak))
    settings["floor_read_by"] = {str(n): reader.way(n) for n in threads}
    if not options.quick:
        report.targets = targets(report.rows)
    return report.finish(options.output)


if __name__ == "__main__":
    sys.exit(main())
