"""The nearest pairs of 15,000 concepts among 3 million: time and memory of the exact search.

    python benchmarks/retrieval.py                         # 15,000 x 3,000,000, d = 512: 6 GB of disk,
    minutes python benchmarks/retrieval.py --pairs 300000
    python benchmarks/retrieval.py --quick

Embeddings are synthetic, written blockwise with a seed: a direction common to each modality, one to three
concepts a pair, noise; sized so that cosines lie where CLIP's do. The floor is what the two matrix products
of the plain way (concepts with pictures, concepts with captions) would take in the precision that is used, at
the rate that a large product reaches between the blocks of the same run. The search needs one product, so it
can pass this floor. The baseline is the plain way in fp32: both products, logarithms, top n of each tile,
merge; timed on a part of the pairs and scaled. Processor time is given beside the clock's: on a machine that
others use only that one can be compared. Checked against float64 for some concepts and all pairs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import Check, Report, Row, Target, arguments

from daco_rt.corpus.search import ArrayVectors, Nearest, SearchPlan, nearest_pairs, similarity

WANTED = 108
DIM = 512
BLOCK = 16_384


def main() -> int:
    options = arguments(__doc__, "retrieval", add)
    if options.quick:
        options.pairs, options.concepts = 20_000, 300
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        began = time.perf_counter()
        queries, vectors = embeddings(Path(folder), options.concepts, options.pairs)
        print(f"embeddings: {time.perf_counter() - began:.0f} s", flush=True)
        settings = {name: getattr(options, name) for name in ("concepts", "pairs", "threads", "precision")}
        report = Report("retrieval", options.quick, settings | {"wanted": WANTED, "concepts_block": 4096})
        for precision in options.precision.split(","):
            row = measure(queries, vectors, precision, options.threads, quick=options.quick)
            report.rows.append(row)
            print(row, flush=True)
    best = min(report.rows, key=lambda row: row.median_ms)
    memory = max(row.peak_memory_mb or 0 for row in report.rows)
    report.targets = [
        Target("time", "at most the two products' processor time",
               f"{best.extra['cpu_over_floor']:.2f} of it", float(best.extra["cpu_over_floor"]) <= 1),
        Target("memory", "under 4 GB beside the mapped embeddings", f"{memory:.0f} MB", memory < 4000),
    ]  # fmt: skip
    return report.finish(options.output)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concepts", type=int, default=15_000)
    parser.add_argument("--pairs", type=int, default=3_000_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="bf16", help="bf16, fp32 or both, with a comma")
    parser.add_argument("--folder", help="where the embeddings are written for the run (default: temporary)")


def embeddings(folder: Path, concepts: int, pairs: int) -> tuple[np.ndarray, ArrayVectors]:
    """Queries [concepts, d] fp32, and pairs' embeddings as mapped fp16 files."""
    random = np.random.default_rng(2026)
    modes = unit(random.standard_normal((2, DIM), dtype=np.float32))
    own = unit(random.standard_normal((concepts, DIM), dtype=np.float32))
    queries = unit(0.75 * modes[1] + 0.66 * own)
    made = [
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (pairs, DIM))
        for name in ("image", "text")
    ]
    for start in range(0, pairs, BLOCK):
        count = min(BLOCK, pairs - start)
        topics = random.integers(0, concepts, (count, 3))
        weights = random.random((count, 3), dtype=np.float32) * np.array([1.0, 0.7, 0.4], np.float32)
        said = (own[topics] * weights[:, :, None]).sum(1)
        for target, mode, share, noise in ((made[0], 0, 0.3, 0.6), (made[1], 1, 0.5, 0.5)):
            base = 0.75 * modes[mode] + (0.25 * modes[1] if mode == 0 else 0)
            blur = noise * random.standard_normal((count, DIM), dtype=np.float32) / np.sqrt(DIM)
            target[start : start + count] = unit(base + share * said + blur)
    for target in made:
        target.flush()
    return queries, ArrayVectors(
        *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("image", "text"))
    )


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def measure(queries: np.ndarray, vectors: ArrayVectors, precision: str, threads: int, quick: bool) -> Row:
    sample = np.sort(np.random.default_rng(0).choice(vectors.rows, min(vectors.rows, 32_768), replace=False))
    plan = SearchPlan(precision=precision)
    rates, spent, worked, scored, memory, found = [], [], 0.0, 0, 0.0, []

    def watch(_: int) -> None:
        nonlocal memory
        memory = max(memory, anonymous_mb())

    for start in range(0, len(queries), 4096):
        rates.append(rates_of(precision))
        began, worked_before = time.perf_counter(), time.process_time()
        part = nearest_pairs(
            queries[start : start + 4096], vectors, WANTED, sample=sample, plan=plan, advance=watch
        )
        spent.append(time.perf_counter() - began)
        worked += time.process_time() - worked_before
        scored += part.scored
        found.append(part)
        print(f"{precision}: concepts from {start}: {spent[-1]:.1f} s", flush=True)
    rates.append(rates_of(precision))
    work = 2.0 * len(queries) * vectors.rows * DIM
    wall_rate, cpu_rate = map(float, np.median(rates, axis=0))
    seconds, floor, floor_worked = sum(spent), 2 * work / wall_rate, 2 * work / cpu_rate
    plain = plain_rate(queries, vectors, 20_000 if quick else 65_536)
    return Row(
        case="nearest pairs",
        shape={"concepts": len(queries), "pairs": vectors.rows, "d": DIM, "n": WANTED},
        dtype=precision,
        threads=threads,
        median_ms=seconds * 1e3,
        p10_ms=seconds * 1e3,
        p90_ms=seconds * 1e3,
        samples=1,
        floor_ms=floor * 1e3,
        floor_bytes=None,
        percent_of_floor=100 * floor / seconds,
        baseline="two fp32 products, logarithms, top n of each tile, merge (scaled from a part)",
        baseline_ms=plain[0] * len(queries) * vectors.rows * 1e3,
        ratio=plain[0] * len(queries) * vectors.rows / seconds,
        peak_memory_mb=memory,
        check=check(queries, vectors, found),
        extra={
            "cpu_seconds": worked,
            "floor_cpu_seconds": floor_worked,
            "cpu_over_floor": worked / floor_worked,
            "baseline_cpu_over_ours": plain[1] * len(queries) * vectors.rows / worked,
            "product_gflops": wall_rate / 1e9,
            "product_gflops_per_cpu_second": cpu_rate / 1e9,
            "product_gflops_per_cpu_second_fp32": rates_of("fp32")[1] / 1e9,
            "scored_per_concept": scored / len(queries),
            "nanoseconds_per_concept_and_pair": seconds / len(queries) / vectors.rows * 1e9,
        },
    )


def rates_of(precision: str) -> tuple[float, float]:
    """Operations of a large product a second of the clock and a second of processor time, medians of five."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2048, DIM).to(dtype), torch.randn(8192, DIM).to(dtype)
    times = []
    for _ in range(6):
        began, worked = time.perf_counter(), time.process_time()
        a @ b.T
        times.append((time.perf_counter() - began, time.process_time() - worked))
    wall, cpu = map(float, np.median(times[1:], axis=0))
    return 2.0 * 2048 * 8192 * DIM / wall, 2.0 * 2048 * 8192 * DIM / cpu


def plain_rate(queries: np.ndarray, vectors: ArrayVectors, pairs: int) -> tuple[float, float]:
    """Seconds of clock and processor a concept and pair of the plain way."""
    query = torch.from_numpy(queries[:2048])
    best = torch.full((len(query), WANTED), -torch.inf)
    index = torch.zeros(len(query), WANTED, dtype=torch.int64)
    pairs = min(pairs, vectors.rows)
    began, worked = time.perf_counter(), time.process_time()
    for start in range(0, pairs, 8192):
        image, text = (
            torch.from_numpy(np.array(part, np.float32))
            for part in vectors.block(start, min(start + 8192, pairs))
        )
        score = similarity(query @ image.T).log_() + similarity(query @ text.T).log_()
        value, at = score.topk(min(WANTED, score.shape[1]), dim=1)
        joined, kept = torch.cat([best, value], 1).topk(WANTED, dim=1)
        index = torch.cat([index, at + start], 1).gather(1, kept)
        best = joined
    done = len(query) * pairs
    return (time.perf_counter() - began) / done, (time.process_time() - worked) / done


def check(queries: np.ndarray, vectors: ArrayVectors, found: list[Nearest]) -> Check:
    """Compare some concepts with all pairs in float64."""
    chosen = np.linspace(0, len(queries) - 1, 4).astype(int)
    scores = []
    for start in range(0, vectors.rows, BLOCK):
        image, text = vectors.block(start, min(start + BLOCK, vectors.rows))
        products = [queries[chosen].astype(float) @ np.asarray(part, float).T for part in (image, text)]
        scores.append(sum(np.log(np.clip((1 + product) / 2, 1e-6, 1)) for product in products))
    whole = np.concatenate(scores, axis=1)
    index = np.concatenate([part.index for part in found])
    wrong = 0
    for row, score in zip(chosen, whole, strict=True):
        order = np.argsort(-score, kind="stable")[:WANTED]
        # Two ways of summing differ in the last bit, so places may be swapped between equals to 1e-12.
        wrong += int((np.abs(score[order] - score[index[row]]) > 1e-12).sum())
        wrong += len(set(order) ^ set(index[row]))
    return Check(wrong == 0, f"{wrong} of {len(chosen) * WANTED} places differ from float64 over all pairs")


def anonymous_mb() -> float:
    """Memory of the process that is not a mapped file, MB; the mapped embeddings are the system's to drop."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    raise SystemExit(main())
