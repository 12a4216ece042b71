"""Sparse coding on the CPU against the libraries that people use for it.

    make bench-peers                             # sets up their environment first; about three minutes, 6 GB
    python benchmarks/peers_cpu.py --quick

One thread, fp32 dictionary, coherent atoms, k = 32. Pursuit picks by absolute value here, as the peers do.
Every result is checked before it is timed: pursuits by what they leave of a row against float64 pursuit, the
elastic net by its objective against float64 coordinate descent, TopK against float64. Each peer has a process
of its own (benchmarks/peers/worker.py, in build/peers-venv), and its calls are timed in turns with ours.
Ours does more in its time: it also edits the row by a policy, and reports doses and support.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, Check, Report, Row, Target, arguments
from references import check_pursuit, expect_sae
from timing import Reader, against, copies_for, settle, spread
from workloads import SLOT, coherence, coherent_dictionary, mixtures, removing_policy

from daco_rt.ops import numpy as ops
from daco_rt.ops import reference
from daco_rt.ops.elastic_net import elastic_net, objective

PYTHON = ROOT / "build" / "peers-venv" / "bin" / "python"
WORKER = Path(__file__).with_name("peers") / "worker.py"
TAU, ALPHA = 0.95, 0.05
OBJECTIVE_BOUND = 1e-4
"""Largest excess of an elastic net's objective over float64's, relative to it."""
RESIDUAL_BOUND = 1.001
ORDER_RECURSIVE_BOUND = 1.02
"""spams takes the atom that leaves least after the refit: nearly the same picks, not quite."""
BOUNDS = {"topk": 1e-5, "omp": RESIDUAL_BOUND, "elastic_net": OBJECTIVE_BOUND}
SHOWN = 256
"""Codes of an elastic net that ours reports; more would make its check meaningless, and fail it."""


@dataclass(frozen=True)
class Size:
    atoms: int
    dim: int
    k: int
    rows: tuple[int, ...]
    seconds: float
    rounds: int
    judged: int
    cold: bool


FULL = Size(15_000, 4_096, 32, (1, 8, 64), 3.0, 15, 2, True)
QUICK = Size(700, 256, 8, (1, 4), 0.05, 3, 2, False)


@dataclass(frozen=True)
class Peer:
    """A method of the worker, the coder of ours that it is compared with, and the most rows it gets."""

    method: str
    name: str
    coder: str
    most_rows: int
    bound: float
    """How far its first rows may be from float64's: see :meth:`Problem.judge`."""


PEERS = (
    Peer("torch_topk", "torch fp32 TopK", "topk", 64, BOUNDS["topk"]),
    Peer("omp_gpu", "orthogonal-matching-pursuit-gpu v0, Gram given", "omp", 64, RESIDUAL_BOUND),
    Peer("spams_omp", "spams omp", "omp", 64, ORDER_RECURSIVE_BOUND),
    Peer("sklearn_omp", "scikit-learn orthogonal_mp_gram", "omp", 1, RESIDUAL_BOUND),
    Peer("spams_lasso", "spams lasso", "elastic_net", 1, OBJECTIVE_BOUND),
    Peer("spams_lasso_gram", "spams lasso, Gram and correlations given", "elastic_net", 64, OBJECTIVE_BOUND),
)


class Problem:
    """Dictionary, rows, Gram matrices and what the first rows must come to, in float64."""

    def __init__(self, size: Size) -> None:
        import torch

        self.size = size
        self.atoms = coherent_dictionary(size.atoms, size.dim)
        self.z = mixtures(self.atoms, max(size.rows))
        self.norm = np.linalg.norm(self.z.astype(np.float64), axis=1)
        self.tables = removing_policy(self.atoms, float(np.median(self.norm)))
        self.slots = np.full(len(self.z), SLOT, np.int32)
        self.bias = np.zeros(size.atoms, np.float32)
        wide = torch.from_numpy(self.atoms)
        self.gram = (wide @ wide.T).numpy()
        self.half = torch.from_numpy(self.gram).half().numpy()
        self.copies = [self.atoms.copy() for _ in range(copies_for(self.atoms.nbytes) if size.cold else 2)]
        self._expect()

    def _expect(self) -> None:
        judged, k, exact = self.size.judged, self.size.k, self.atoms.astype(np.float64)
        columns, zero = reference.GramColumns(exact, exact), np.zeros(len(exact))
        self.topk = expect_sae(self.z[:judged], exact, zero, exact, self.tables, "topk", k)
        lengths = np.linalg.norm(exact, axis=1)
        self.residual, self.objective = [], []
        self.start = self.z[:judged].astype(np.float64) @ exact.T
        for row, start, norm in zip(self.z[:judged].astype(np.float64), self.start, self.norm, strict=False):
            code = reference.orthogonal_matching_pursuit(
                row, exact, zero, columns, exact, k=k, sign="signed", tol=0
            )
            self.residual.append(self.left(row, np.flatnonzero(code), code[np.flatnonzero(code)]))
            code = elastic_net(
                row, exact, zero, columns.__getitem__, lengths**2, lengths, tau=TAU, alpha=ALPHA, signed=False
            )
            support = np.flatnonzero(code)
            self.objective.append(self.value(start, norm, support, code[support]))

    def left(self, row: np.ndarray, index: np.ndarray, value: np.ndarray) -> float:
        """‖z - Σ c_i A_i‖ in float64."""
        return float(np.linalg.norm(row - value.astype(np.float64) @ self.atoms[index].astype(np.float64)))

    def value(self, start: np.ndarray, norm: float, index: np.ndarray, value: np.ndarray) -> float:
        """The elastic net's objective of a sparse code in units of the row."""
        rows = self.atoms[index].astype(np.float64)
        return objective(
            value.astype(np.float64), start[index], rows @ rows.T, tau=TAU, alpha=ALPHA, norm=norm
        )

    def judge(self, coder: str, index: np.ndarray, value: np.ndarray, bound: float, unit: bool) -> Check:
        """Hold codes [T, c] against float64 on the first rows; ``unit`` codes are of rows of length 1."""
        worst, rows = 0.0, min(self.size.judged, len(index))
        for t in range(rows):
            on = index[t] >= 0
            support, code = index[t][on], value[t][on].astype(np.float64)
            code = code * self.norm[t] if unit else code
            if coder == "omp":
                worst = max(worst, self.left(self.z[t], support, code) / self.residual[t])
            elif coder == "elastic_net":
                excess = self.value(self.start[t], self.norm[t], support, code) - self.objective[t]
                worst = max(worst, excess / abs(self.objective[t]))
            else:
                best = np.sort(np.maximum(self.start[t], 0))[::-1][: self.size.k]
                ranked = np.sort(code)[::-1]
                worst = max(worst, float(np.abs(ranked - best).max() / best[0]))
        what = {
            "omp": "residual ≤ {:.6f} × float64's",
            "elastic_net": "objective at most {:.1e} above float64's",
            "topk": "codes within {:.1e} of float64's",
        }[coder]
        return Check(bool(worst <= bound), what.format(worst) + f" on {rows} rows")

    def save(self, folder: Path) -> None:
        """Write what the workers read."""
        for name, array in (("atoms", self.atoms), ("gram", self.gram), ("z", self.z), ("bias", self.bias)):
            np.save(folder / f"{name}.npy", array)
        settings = {"k": self.size.k, "tau": TAU, "alpha": ALPHA}
        (folder / "settings.json").write_text(json.dumps(settings))

    def ours(self, coder: str, rows: int) -> Callable[[int], Any]:
        """Our operator as a function of the round's number, by which it takes a copy of the dictionary."""
        z, slots, tables, k = self.z[:rows], self.slots[:rows], self.tables.operands(), self.size.k

        def call(turn: int) -> Any:
            e = self.copies[turn % len(self.copies)]
            if coder == "topk":
                d = self.copies[(turn + 1) % len(self.copies)]
                return ops.steer_sae(z, slots, e, self.bias, d, coder="topk", k=k, k_out=k, **tables)
            how: dict[str, Any] = {"sign": "signed", "k": k, "k_out": k}
            if coder == "elastic_net":
                how = {"coder": coder, "tau": TAU, "alpha": ALPHA, "k_out": min(SHOWN, len(e))}
            return ops.steer_pursuit(z, slots, e, self.bias, e, gram=self.half, **how, **tables)

        return call


class Worker:
    """A peer's process: see benchmarks/peers/worker.py for the lines it takes."""

    def __init__(self, method: str, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [PYTHON, WORKER, method, folder, "1"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def run(self, rows: int) -> float:
        """Seconds of one call, by the worker's own clock."""
        return self._ask(f"run {rows}")

    def code(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Index and value [T, c] of one call."""
        self._ask(f"save {rows}")
        return np.load(self.folder / "index.npy"), np.load(self.folder / "value.npy")

    def close(self) -> None:
        """End the process, after its last answer."""
        self.process.communicate()

    def _ask(self, line: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a peer's process ended: {self.process.communicate()[1][-2000:]}")
        return line


@contextmanager
def worker(method: str, folder: Path) -> Iterator[Worker]:
    """A peer's process for a while."""
    process = Worker(method, folder)
    try:
        yield process
    finally:
        process.close()


def measure(problem: Problem, folder: Path, reader: Reader) -> Iterator[Row]:
    """Yield a row for each peer and number of rows."""
    for peer in PEERS:
        with worker(peer.method, folder) as process:
            for rows in (t for t in problem.size.rows if t <= peer.most_rows):
                yield timed(problem, reader, peer, process, rows)


def timed(problem: Problem, reader: Reader, peer: Peer, process: Worker, rows: int) -> Row:
    """Check ours and the peer, then time them in turns with the floor."""
    size, function = problem.size, problem.ours(peer.coder, rows)
    theirs = problem.judge(
        peer.coder, *process.code(rows), peer.bound, unit=peer.method.startswith("spams_lasso")
    )
    out = function(0)
    mine = problem.judge(peer.coder, out.support_index, out.support_value, BOUNDS[peer.coder], unit=False)
    if peer.coder == "omp":
        edits = check_pursuit(
            out.z, out.doses, out.support_index, out.support_value, problem.z[:rows], problem.atoms,
            problem.tables, problem.residual[: min(rows, size.judged)],
        )  # fmt: skip
        mine = Check(mine.passed and edits.passed, edits.detail)
    times = in_turns(
        problem, function, reader, process, rows, theirs.passed, peer.method == "spams_lasso_gram"
    )
    median = float(np.median(times["ours"]))
    extra: dict[str, float | int | str] = {"ms_per_row": median * 1e3 / rows}
    if "encode" in times:
        # The peer was given the correlations: what ours takes for them is about what TopK takes in all.
        beyond = np.maximum(times["ours"] - times["encode"], 1e-9)
        extra["ms_per_row_beyond_topk"] = float(np.median(beyond)) * 1e3 / rows
        if theirs.passed:
            extra["ratio_beyond_topk"] = against(beyond, times["peer"])
    name = {"topk": "SteerSae topk", "omp": "SteerPursuit omp", "elastic_net": "SteerPursuit elastic_net"}
    print(f"  {name[peer.coder]} T={rows} against {peer.name}: {median * 1e3:.3f} ms", file=sys.stderr)
    return Row(
        case=name[peer.coder],
        shape={"T": rows, "m": size.atoms, "d": size.dim, "k": size.k},
        dtype="fp32",
        threads=1,
        **spread(times["ours"]),
        floor_ms=float(np.median(times["floor"])) * 1e3,
        floor_bytes=problem.atoms.nbytes,
        percent_of_floor=100 * against(times["ours"], times["floor"]),
        baseline=peer.name if theirs.passed else f"{peer.name} (wrong, not timed)",
        baseline_ms=float(np.median(times["peer"])) * 1e3 if theirs.passed else None,
        ratio=against(times["ours"], times["peer"]) if theirs.passed else None,
        peak_memory_mb=None,
        check=Check(mine.passed, f"{mine.detail}; peer: {theirs.detail}"),
        extra=extra,
    )


def in_turns(
    problem: Problem,
    function: Callable[[int], Any],
    reader: Reader,
    process: Worker,
    rows: int,
    with_peer: bool,
    gives_correlations: bool,
) -> dict[str, np.ndarray]:
    """Seconds of ours, the floor and the peer, round by round; slow peers get two rounds."""
    calls: dict[str, Callable[[int], Any]] = {
        "ours": function,
        "floor": lambda _: reader.read(problem.atoms.nbytes, 1),
    }
    if gives_correlations:
        calls["encode"] = problem.ours("topk", rows)
    times: dict[str, list[float]] = {name: [] for name in (*calls, "peer")}
    began = time.perf_counter()
    for turn in range(problem.size.rounds + 1):
        for name, call in calls.items():
            settle()
            start = time.perf_counter()
            call(turn)
            times[name].append(time.perf_counter() - start)
        if with_peer:
            times["peer"].append(process.run(rows))
        if turn >= 2 and time.perf_counter() - began > problem.size.seconds:
            break
    return {name: np.array(spent[1:]) for name, spent in times.items() if spent}


def targets(rows: list[Row]) -> list[Target]:
    """Hold the rows against the goals."""

    def goal(name: str, bound: float, peer: str, t: int, key: str = "") -> Target:
        row = next((r for r in rows if (r.baseline or "").startswith(peer) and r.shape["T"] == t), None)
        ratio = None if row is None else row.extra.get(key) if key else row.ratio
        if not isinstance(ratio, float):
            return Target(name, f"≥ {bound:g} ×", "", None)
        return Target(name, f"≥ {bound:g} ×", f"{ratio:.1f} ×", ratio >= bound)

    return [
        goal("topk T = 8, faster than torch fp32", 2.5, "torch fp32 TopK", 8),
        goal("omp T = 64, faster than orthogonal-matching-pursuit-gpu", 30, "orthogonal", 64),
        goal("omp T = 64, faster than spams", 80, "spams omp", 64),
        goal("elastic net T = 64, faster than spams lasso, Gram and correlations given to both", 15,
             "spams lasso, Gram", 64, "ratio_beyond_topk"),
    ]  # fmt: skip


def main() -> int:
    options = arguments(__doc__, "peers_cpu")
    if not PYTHON.exists():
        print(
            f"the peers' environment {PYTHON.parents[1]} is missing: run `make bench-peers`", file=sys.stderr
        )
        return 1
    size = QUICK if options.quick else FULL
    print(f"threads: 1; m = {size.atoms}, d = {size.dim}, k = {size.k}", flush=True)
    problem = Problem(size)
    reader = Reader(problem.atoms.nbytes, cold=size.cold)
    settings: dict[str, Any] = {
        "threads": [1],
        "sign": "signed",
        "gram": "ours fp16, the peers' fp32",
        "elastic_net": {"tau": TAU, "alpha": ALPHA},
        "dictionary": coherence(problem.atoms),
        "peers": peer_versions(),
    }
    report = Report("peers_cpu", options.quick, settings, shown=("ms_per_row", "ratio_beyond_topk"))
    with tempfile.TemporaryDirectory(prefix="daco-peers-") as name:
        problem.save(Path(name))
        report.rows.extend(measure(problem, Path(name), reader))
    if not options.quick:
        report.targets = targets(report.rows)
    return report.finish(options.output)


def peer_versions() -> dict[str, str]:
    """What is installed in the peers' environment."""
    names = ("torch", "numpy", "scikit-learn", "spams-bin", "orthogonal-matching-pursuit-gpu")
    ask = f"from importlib.metadata import version; print(*(version(n) for n in {names!r}))"
    found = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(names, found, strict=True))


if __name__ == "__main__":
    sys.exit(main())
