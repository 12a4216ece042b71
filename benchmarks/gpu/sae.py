"""SteerSae on a GPU: TopK and edited latents only, one token, a decode batch, and a prompt.

    python benchmarks/gpu/sae.py             # about two minutes, 8 GB of GPU memory
    python benchmarks/gpu/sae.py --compact   # half of that
    python benchmarks/gpu/sae.py --quick     # runs on the CPU too

Rows of bf16; encoder and decoder in bf16, fp8 and int8. Calls are captured in a CUDA graph, and each call of
a replay has another encoder and decoder, as the steered blocks of a decoder have. Floor: one read of the
encoder (of its edited latents), or the operations of E z at the measured speed of a bf16 product, whichever
takes longer. Baseline: mm, relu, topk, gather and edit of torch in bf16, under a CUDA graph too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import measure
import numpy as np
import torch

# isort: split
import baselines
from harness import Check, Report, Row, Target, arguments
from references import DOSE_BOUND, ROW_BOUND, Expected, expect_sae
from timing import against, spread
from workloads import SLOT, coherence, coherent_dictionary, mixtures, removing_policy

import daco_rt.ops as ops

BASELINE = "torch bf16 topk"
ROUNDING = 2.0**-8


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


FULL = Size(15_000, 4_096, 32, (1, 2, 4, 8, 16, 64, 2_048), 4, 60, 16)
COMPACT = replace(FULL, rows=(1, 16, 64, 2_048), rounds=20, judged=4)
QUICK = Size(300, 64, 8, (1, 5), 2, 3, 5)


class Weights:
    """One type of encoder and decoder: several copies on the device, and what they mean in float64."""

    def __init__(self, name: str, atoms: np.ndarray, size: Size, device: torch.device) -> None:
        self.name = name
        wide = torch.from_numpy(atoms)
        self.scales: torch.Tensor | None = None
        if name == "bf16":
            stored, self.meant = wide.bfloat16(), atoms.astype(np.float64)
        else:
            stored, scale = ops.quantise(wide, name)
            self.scales = torch.stack([scale, scale]).to(device)
            self.meant = stored.float().numpy().astype(np.float64) * scale.numpy()[:, None]
        first = stored.to(device)
        self.copies = [first] + [first.clone() for _ in range(size.copies - 1)]


class Problem:
    """Rows, tables and weights of each type, on the device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        atoms = coherent_dictionary(size.atoms, size.dim)
        rows = torch.from_numpy(mixtures(atoms, max(size.rows))).bfloat16()
        self.rows = rows.float().numpy()
        self.coherence = coherence(atoms)
        self.tables = removing_policy(atoms, float(np.median(np.linalg.norm(self.rows, axis=1))))
        self.z = rows.to(device)
        self.slots = torch.full((len(rows),), SLOT, dtype=torch.int32, device=device)
        self.operands = {name: torch.from_numpy(a).to(device) for name, a in self.tables.operands().items()}
        self.bias = torch.full((size.atoms,), -0.01, device=device)
        # ReLU SAEs are sparse: one latent in fifty is above the bias of theirs.
        codes = self.rows[: size.judged] @ atoms.T
        self.sparse_bias = torch.full((size.atoms,), -float(np.quantile(codes, 0.98)), device=device)
        names = ("bf16", "fp8", "int8") if measure.on_gpu(device) else ("bf16", "int8")
        self.weights = {name: Weights(name, atoms, size, device) for name in names}

    def bias_of(self, coder: str) -> torch.Tensor:
        """The encoder's bias."""
        return self.bias if coder == "topk" else self.sparse_bias

    def call(self, weights: Weights, coder: str, rows: int, copy: int) -> Any:
        """Steer the first rows with one of the copies."""
        w = weights.copies[copy]
        return ops.steer_sae(
            self.z[:rows], self.slots[:rows], w, self.bias_of(coder), w, scales=weights.scales, coder=coder,
            k=self.size.k, k_out=0, **self.operands,
        )  # fmt: skip

    def replay(self, weights: Weights, coder: str, rows: int) -> measure.Replay:
        """One call with every copy."""
        calls = [lambda c=copy: self.call(weights, coder, rows, c) for copy in range(self.size.copies)]
        return measure.Replay(calls, self.device)

    def plain(self, rows: int) -> measure.Replay:
        """TopK in plain torch, bf16, with every copy."""
        copies = self.weights["bf16"].copies
        edit = baselines.Edit(
            self.operands["gain"][SLOT].bfloat16(), self.operands["shift"][SLOT].bfloat16(),
            float(self.tables.limits[SLOT, 0]), copies[0].float().norm(dim=1).bfloat16(),
        )  # fmt: skip
        bias, z = self.bias.bfloat16(), self.z[:rows]
        calls = [lambda w=w: baselines.topk(z, w, bias, w, edit, self.size.k) for w in copies]
        return measure.Replay(calls, self.device)

    def expected(self, weights: Weights, coder: str) -> Expected:
        """The first rows in float64."""
        w, bias = weights.meant, self.bias_of(coder).cpu().numpy()
        return expect_sae(self.rows[: self.size.judged], w, bias, w, self.tables, coder, self.size.k)


def judge(problem: Problem, weights: Weights, coder: str, rows: int, expected: Expected) -> Check:
    """Hold the first rows against float64, and a second call against the first, bit for bit."""
    first, again = (problem.call(weights, coder, rows, copy) for copy in (0, 1))
    few = min(rows, problem.size.judged)
    expected = expected.rows(slice(few))
    out, doses = (x[:few].double().cpu().numpy() for x in first[:2])
    # What rounding to bf16 does to each number is granted, the rest is measured against the row's norm.
    excess = np.maximum(np.abs(out - expected.z) - ROUNDING * np.abs(expected.z), 0)
    errors = np.linalg.norm(excess, axis=1) / np.linalg.norm(problem.rows[:few], axis=1)
    off = np.abs(doses - expected.doses).max(axis=1)
    row_error, dose_error = (float(x[expected.clear].max(initial=0)) for x in (errors, off))
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    passed = row_error <= ROW_BOUND and dose_error <= DOSE_BOUND and bool(np.isfinite(out).all())
    return Check(
        passed and same and bool(expected.clear.any()),
        f"{int(expected.clear.sum())} of {few} rows equal float64 (the rest stand next to a cliff), error "
        f"{row_error:.1e} of |z| beyond rounding, doses {dose_error:.1e}; a second call gives "
        f"{'the same bits' if same else 'OTHER BITS'}",
    )


def product_speed(device: torch.device) -> float:
    """Operations a second of a large bf16 product of matrices by torch."""
    n = 8192 if measure.on_gpu(device) else 256
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    times = measure.in_turns({"mm": measure.Replay([lambda: a @ b], device)}, rounds=5)["mm"]
    return 2.0 * n**3 / float(np.median(times))


@torch.inference_mode()
def rows_of(problem: Problem, bandwidth: float, speed: float) -> Iterator[Row]:
    """Yield a row for every case; results are checked before they are timed."""
    size = problem.size
    cases = [("topk", name, rows) for name in problem.weights for rows in size.rows]
    cases += [("relu", name, rows) for name in problem.weights for rows in (1, min(16, max(size.rows)))]
    expectations: dict[tuple[str, str], Expected] = {}
    for coder, name, rows in cases:
        weights = problem.weights[name]
        if (coder, name) not in expectations:
            expectations[coder, name] = problem.expected(weights, coder)
        check = judge(problem, weights, coder, rows, expectations[coder, name])
        replays = {"ours": problem.replay(weights, coder, rows)}
        if coder == "topk":
            replays["plain"] = problem.plain(rows)
        times = measure.in_turns(replays, rounds=size.rounds)
        latents = size.atoms if coder == "topk" else len(problem.tables.watched)
        nbytes = latents * size.dim * weights.copies[0].element_size()
        floor = max(nbytes / bandwidth, 2.0 * rows * latents * size.dim / speed)
        plain = times.get("plain")
        row = Row(
            case=f"SteerSae {coder}",
            shape={"T": rows, "m": size.atoms, "d": size.dim, "k": size.k if coder == "topk" else latents},
            dtype=name,
            threads=1,
            **spread(times["ours"]),
            floor_ms=floor * 1e3,
            floor_bytes=nbytes,
            percent_of_floor=100 * floor / float(np.median(times["ours"])),
            baseline=None if plain is None else BASELINE,
            baseline_ms=None if plain is None else float(np.median(plain)) * 1e3,
            ratio=None if plain is None else against(times["ours"], plain),
            peak_memory_mb=measure.peak_memory_mb(problem.device),
            check=check,
            extra={"us": float(np.median(times["ours"])) * 1e6},
        )
        print(f"  {coder} {name} T={rows}: {row.extra['us']:.1f} µs", file=sys.stderr, flush=True)
        yield row


def targets(rows: list[Row]) -> list[Target]:
    """Hold the rows against the goals."""
    found = {(row.case.split()[1], row.dtype, row.shape["T"]): row for row in rows}

    def near_floor(coder: str, dtype: str, t: int, bound: float) -> Target:
        row = found.get((coder, dtype, t))
        times = None if row is None or row.floor_ms is None else row.median_ms / row.floor_ms
        text = "" if times is None else f"{times:.2f} × floor"
        met = None if times is None else times <= bound
        return Target(f"{coder} {dtype}, T = {t}", f"≤ {bound:g} × floor", text, met)

    watched = found.get(("relu", "bf16", 1))
    micros = None if watched is None else watched.median_ms * 1e3
    ratios = [found[key].ratio for key in found if key[:2] == ("topk", "bf16") and key[2] <= 16]
    slowest = min((ratio for ratio in ratios if ratio is not None), default=None)
    return [
        near_floor("topk", "bf16", 1, 1.25),
        near_floor("topk", "fp8", 1, 1.4),
        near_floor("topk", "bf16", 16, 1.4),
        near_floor("topk", "bf16", 64, 1.7),
        Target(
            "edited latents only, T = 1", "≤ 7 µs", "" if micros is None else f"{micros:.1f} µs",
            None if micros is None else micros <= 7,
        ),
        Target(
            f"faster than {BASELINE}, T ≤ 16", "≥ 1.8 ×", "" if slowest is None else f"{slowest:.2f} ×",
            None if slowest is None else slowest >= 1.8,
        ),
    ]  # fmt: skip


def main() -> int:
    options = arguments(__doc__, "gpu_sae", measure.add_options)
    device = torch.device(options.device)
    size = QUICK if options.quick else COMPACT if options.compact else FULL
    bandwidth = measure.copy_bandwidth(device)
    problem = Problem(size, device)
    speed = product_speed(device)
    settings: dict[str, Any] = {
        "threads": [1],
        **measure.describe(device),
        "activations": "bf16",
        "floor": "one read of the latents at the copy bandwidth, or E z at the speed of a bf16 product",
        "copy_gb_s": round(bandwidth / 1e9, 1),
        "product_tflops": round(speed / 1e12, 1),
        "dictionary": problem.coherence,
        "edited_latents": len(problem.tables.watched),
        "rotated_copies": size.copies,
    }
    report = Report("gpu_sae", options.quick, settings, shown=("us",))
    for row in rows_of(problem, bandwidth, speed):
        report.add(row, options.output)
    if not options.quick:
        report.targets = targets(report.rows)
    return report.finish(options.output)


if __name__ == "__main__":
    sys.exit(main())
