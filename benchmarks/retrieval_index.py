"""An approximate index before the exact score: what it would save, and what it would lose.

    python -m pip install faiss-cpu       # for this script alone
    python benchmarks/retrieval_index.py  # a minute or two

The upper bound of the exact search is an inner product with one vector a pair, so an index of FAISS can hold
those vectors and propose candidates, which are then scored exactly. Measured on the synthetic embeddings of
retrieval.py: processor time of the exact search over all pairs, of building an inverted-file index, of its
queries, and the share of the true nearest pairs that are among the candidates (four times as many).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, commit, machine, print_table, versions
from retrieval import embeddings

from daco_rt.corpus.search import SearchPlan, nearest_pairs

NEAREST, CANDIDATES, LISTS = 27, 108, 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--concepts", type=int, default=1_024)
    parser.add_argument("--probes", default="4,16,64", help="lists that a query looks into")
    parser.add_argument("--output", type=Path, default=RESULTS / "retrieval_index.json")
    options = parser.parse_args()
    try:
        import faiss
    except ImportError:
        parser.error("this script needs faiss-cpu: python -m pip install faiss-cpu")
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        queries, vectors = embeddings(Path(folder), 15_000, options.pairs)
        queries = queries[: options.concepts]
        sample = np.random.default_rng(0).choice(options.pairs, min(options.pairs, 32_768), replace=False)
        began = time.process_time()
        exact = nearest_pairs(queries, vectors, NEAREST, sample=sample, plan=SearchPlan(precision="bf16"))
        exact_seconds = time.process_time() - began
        # The touching point where the nearest pairs lie, which the index could only estimate.
        points = [float(2 * part.mean() - 1) for part in (exact.image, exact.text)]
        image, text = (np.asarray(part, np.float32) for part in (vectors.image, vectors.text))
        mixed = image / (1 + points[0]) + text / (1 + points[1])
        began = time.process_time()
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(mixed.shape[1]), mixed.shape[1], LISTS, faiss.METRIC_INNER_PRODUCT
        )
        index.train(mixed[::4])
        index.add(mixed)
        build_seconds = time.process_time() - began
        rows: list[dict[str, Any]] = []
        for probes in map(int, options.probes.split(",")):
            index.nprobe = probes
            began = time.process_time()
            _, found = index.search(queries, CANDIDATES)
            seconds = time.process_time() - began
            rows.append(
                {
                    "lists_probed": f"{probes} of {LISTS}",
                    "query_cpu_seconds": round(seconds, 2),
                    "over_exact": round(seconds / exact_seconds, 2),
                    "recall": round(recall(queries, image, text, found, exact.index), 3),
                }
            )
    print_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    print(f"exact {exact_seconds:.2f} s, building the index {build_seconds:.2f} s")
    report = {
        "benchmark": "retrieval_index",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions() | {"faiss": faiss.__version__},
        "settings": {key: str(value) for key, value in vars(options).items() if key != "output"},
        "exact_cpu_seconds": round(exact_seconds, 2),
        "build_cpu_seconds": round(build_seconds, 2),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def recall(
    queries: np.ndarray, image: np.ndarray, text: np.ndarray, found: np.ndarray, exact: np.ndarray
) -> float:
    """The share of the nearest pairs that remain after the candidates are scored exactly."""
    hits = 0
    for query, candidates, nearest in zip(queries.astype(float), found, exact, strict=True):
        rows = candidates[candidates >= 0]
        score = np.log((1 + image[rows] @ query) / 2) + np.log((1 + text[rows] @ query) / 2)
        hits += len(set(rows[np.argsort(-score, kind="stable")[:NEAREST]]) & set(nearest))
    return hits / exact.size


if __name__ == "__main__":
    main()
