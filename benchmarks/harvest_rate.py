"""Harvest of concept means: stimuli a second against the bare model, memory against the number of stimuli.

    python benchmarks/harvest_rate.py            # about ten minutes, smol-internvl
    python benchmarks/harvest_rate.py --quick    # pocket-internvl, seconds
    python benchmarks/harvest_rate.py --curve    # memory and rate up to 405,000 stimuli, pocket-internvl

Rate: one shard, from its texts to its committed file (tokens, forward passes, gathering, sums, writing), in
turns with the forward passes alone: the same padded batches, in a text model that ends at the last block that
is read. Both in wall time and in processor time, which others on the machine disturb less. Memory: the peak
of a fresh process that harvests so many stimuli at an early block, where a pass is short and the batches are
as large. The last part is a calculation, not a measurement: what the rates mean for a 7B model on eight GPUs,
with every assumption in the report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, Check, Report, Row, Target, arguments, print_table
from timing import against, in_turns, settle, spread

from daco_rt.concepts import make_stimuli, save_stimuli, shipped_table
from daco_rt.dictionary.encode import Losses
from daco_rt.dictionary.harvest import HarvestPlan, ShardWorker
from daco_rt.dictionary.items import HarvestItem, ItemTable, table_concepts, text_items
from daco_rt.dictionary.means import ConceptMeans
from daco_rt.dictionary.reading import MeanSums
from daco_rt.models import model_identity, resolve_checkpoint
from daco_rt.models.loading import load_torch
from daco_rt.models.residual import length_batches, read_blocks, text_model_of

BATCH_TOKENS = 2048

# Run in a process of its own; VmHWM counts only its own memory, unlike what wait4 reports of a child.
MEMORY = """
import gc, json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from harness import return_free_memory
from harvest_rate import peak_mb, plan_of_file, loaded
import torch
torch.set_num_threads(1)
checkpoint, texts, output = sys.argv[2], *map(Path, sys.argv[3:5])
stimuli, concepts, *blocks = map(int, sys.argv[5:])
model, tokenizer, identity = loaded(checkpoint)
# A mapped table of embeddings fills as new words are met; a copy in memory does not.
for parameter in model.parameters():
    parameter.data = parameter.data.clone()
gc.collect()
return_free_memory()
# The kernel begins the peak anew.
Path("/proc/self/clear_refs").write_text("5")
before = peak_mb()
plan = plan_of_file(identity, output, texts, stimuli, concepts, tuple(blocks))
began, began_used = time.perf_counter(), time.process_time()
means = plan.run(model, tokenizer, progress=False)
wall, used = time.perf_counter() - began, time.process_time() - began_used
print(json.dumps({
    "stimuli": means.stimuli, "concepts": concepts, "shards": means.shards.count,
    "peak_mb": round(peak_mb(), 1), "with_model_loaded_mb": round(before, 1), "seconds": round(wall, 1),
    "processor_seconds": round(used, 1), "stimuli_a_processor_second": round(stimuli / used, 1),
}))
"""


@dataclass(frozen=True)
class Size:
    """What is run: checkpoint, blocks, stimuli of the timed shard and of the weighed processes, which read
    so many texts a concept."""

    checkpoint: str
    blocks: tuple[int, ...]
    stimuli: int
    memory_blocks: tuple[int, ...]
    memory_stimuli: tuple[int, ...]
    rounds: int
    texts: int = 7


FULL = Size("smol-internvl", (15, 16, 17, 18, 19), 256, (1,), (500, 2_000, 8_000), 4)
QUICK = Size("pocket-internvl", (2, 3), 64, (1,), (50,), 2)
# As many stimuli as the method's authors used: 15,000 concepts with 27 each.
CURVE = replace(QUICK, memory_stimuli=(10_000, 50_000, 100_000, 405_000), texts=27)

# The calculation's assumptions; each is a plain number that a reader may replace.
ASSUMED: dict[str, float] = {
    "model_parameters": 7e9,
    "blocks_of_model": 28,
    "last_block_read": 19,
    "blocks_read": 5,
    "width": 3584,
    "concepts": 15_000,
    "pairs_a_concept": 27,
    "text_tokens": 24,
    "picture_tokens": 300,
    "vision_flop_a_picture": 0.6e12,
    "gpus": 8,
    "gpu_peak_flop_a_second": 989e12,
    "share_of_peak": 0.4,
    "cpu_seconds_to_prepare_a_picture": 0.02,
    "cpu_threads_a_gpu": 8,
}


def loaded(checkpoint: str) -> tuple[Any, Any, Any]:
    """Return model, tokenizer and identity of a built-in checkpoint."""
    found = resolve_checkpoint(None, checkpoint)
    return *load_torch(found.path, "cpu", "fp32"), model_identity(found)


def plan_for(identity: Any, output: Path, stimuli: int, blocks: tuple[int, ...]) -> HarvestPlan:
    """Plan a harvest of so many stimuli: seven texts a concept of the package's table."""
    table = shipped_table()[: -(-stimuli // 7)]
    items = list(text_items(make_stimuli(table).stimuli))[:stimuli]
    concepts = table_concepts(table)
    return HarvestPlan(
        concepts, ItemTable(items, len(concepts)), tuple(blocks), output, identity, batch_tokens=BATCH_TOKENS
    )


def plan_of_file(
    identity: Any, output: Path, texts: Path, stimuli: int, concepts: int, blocks: tuple[int, ...]
) -> HarvestPlan:
    """Plan a harvest of a file's first stimuli, which are read one by one as the command does it."""
    table = table_concepts(shipped_table()[:concepts])
    items = ItemTable(islice(text_items(texts, table), stimuli), len(table))
    return HarvestPlan(table, items, blocks, output, identity, batch_tokens=BATCH_TOKENS)


def peak_mb() -> float:
    """Return the most memory that this process has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1e3
    return float("nan")


def measure_rate(size: Size, scratch: Path, threads: int, settings: dict[str, Any]) -> Iterator[Row]:
    """Time one shard against its bare forward passes."""
    torch.set_num_threads(threads)
    model, tokenizer, identity = loaded(size.checkpoint)
    plan = plan_for(identity, scratch / "rate", size.stimuli, size.blocks)
    # One shard holds all of them.
    object.__setattr__(plan, "concepts_per_shard", len(plan.concepts))
    means = plan.begin(model, tokenizer)
    worker = ShardWorker(plan, means, model, tokenizer)

    # What runs bare: the batches of the harvest, padded alike, in a model that has no later block.
    stimuli = [s for part in plan.encoder(tokenizer).encode(list(plan.table), 0, Losses()) for s in part]
    ids = [stimulus.tokens.ids for stimulus in stimuli]
    batches = []
    for members in length_batches([len(row) for row in ids], BATCH_TOKENS):
        padded = torch.zeros((len(members), max(len(ids[i]) for i in members)), dtype=torch.long)
        for row, i in enumerate(members):
            padded[row, : len(ids[i])] = torch.tensor(ids[i])
        batches.append(padded)
    text = text_model_of(model)

    def bare() -> None:
        layers = text.layers
        text.layers = layers[: size.blocks[-1] + 1]
        try:
            with torch.inference_mode():
                for padded in batches:
                    text(input_ids=padded, use_cache=False)
        finally:
            text.layers = layers

    wall, used = in_pairs({"harvest": lambda: worker.make(0), "bare": bare}, size.rounds)
    mine, other = wall["harvest"], wall["bare"]
    tokens, computed = sum(map(len, ids)), sum(padded.numel() for padded in batches)
    settings |= {"batch_tokens": BATCH_TOKENS, "batches": len(batches)}
    yield Row(
        case="harvest of one shard",
        shape={"stimuli": size.stimuli, "tokens": tokens, "blocks": len(size.blocks), "d": means.dim},
        dtype="fp32",
        threads=threads,
        **spread(mine),
        floor_ms=None,
        floor_bytes=None,
        percent_of_floor=None,
        baseline="bare forward of the same batches, ended at the last block read",
        baseline_ms=float(np.median(other)) * 1e3,
        ratio=against(mine, other),
        peak_memory_mb=None,
        check=check(means, plan, model, ids, stimuli),
        extra={
            "stimuli_per_s": size.stimuli / float(np.median(mine)),
            "bare_stimuli_per_s": size.stimuli / float(np.median(other)),
            "processor_ratio": against(used["harvest"], used["bare"]),
            "processor_ms": float(np.median(used["harvest"])) * 1e3,
            "tokens_per_s": tokens / float(np.median(mine)),
            "padding_percent": 100 * (1 - tokens / computed),
        },
    )


def in_pairs(
    functions: dict[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Time functions in turns, after a round that is thrown away; return seconds of wall and processor."""
    wall: dict[str, list[float]] = {name: [] for name in functions}
    used: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            settle()
            began, began_used = time.perf_counter(), time.process_time()
            function()
            used[name].append(time.process_time() - began_used)
            wall[name].append(time.perf_counter() - began)
    return tuple({n: np.array(t[1:]) for n, t in times.items()} for times in (wall, used))  # type: ignore


def check(means: ConceptMeans, plan: HarvestPlan, model: Any, ids: list, stimuli: list) -> Check:
    """The shard's means equal the mean of the readings one by one, in float64."""
    block = plan.blocks[-1]
    sums = np.zeros((len(plan.concepts), means.dim))
    counts = np.zeros(len(plan.concepts), int)
    for i, streams in read_blocks(model, ids, [block], batch_tokens=BATCH_TOKENS):
        row = streams[block][stimuli[i].positions[0]].double().numpy()
        if np.linalg.norm(row) <= plan.norm_limit * means.median_norm[block]:
            sums[stimuli[i].item.concept] += row
            counts[stimuli[i].item.concept] += 1
    expected = sums / np.maximum(counts, 1)[:, None]
    error = float(np.abs(means.mean(block) - expected).max() / np.abs(expected).max())
    same = bool((means.count(block) == counts).all())
    return Check(same and error <= 1e-5, f"means by hand, float64: {error:.1e} of the largest value")


def measure_memory(size: Size, scratch: Path) -> list[dict[str, Any]]:
    """Weigh and time a fresh process for each number of stimuli."""
    rows = []
    concepts = [-(-stimuli // size.texts) for stimuli in size.memory_stimuli]
    texts = scratch / "texts.jsonl"
    save_stimuli(make_stimuli(shipped_table()[: max(concepts)], count=size.texts).stimuli, texts)
    for stimuli, count in zip(size.memory_stimuli, concepts, strict=True):
        output = scratch / f"memory-{stimuli}"
        command = [sys.executable, "-c", MEMORY, str(Path(__file__).parent), size.checkpoint, str(texts)]
        done = subprocess.run(
            [*command, str(output), *map(str, (stimuli, count, *size.memory_blocks))],
            capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        found = json.loads(done.stdout)
        shutil.rmtree(output)
        if found["stimuli"] != stimuli:
            raise SystemExit(f"{found['stimuli']} of {stimuli} stimuli were read")
        rows.append(found)
    return rows


def measure_sums(size: Size) -> Row:
    """Time the running sums, which the host does while a GPU runs, at the width of a 7B model."""
    blocks, width = int(ASSUMED["blocks_read"]), int(ASSUMED["width"])
    count = 20 if size is QUICK else 200
    draw = np.random.default_rng(0)
    found = np.concatenate(
        [draw.standard_normal((blocks, count, width), np.float32), np.zeros((blocks, count, 3), np.float32)],
        2,
    )
    found[:, :, -3] = 1

    items = [HarvestItem(concept, 1, "", None, None, None, "") for concept in range(10)]

    def add(_: int) -> MeanSums:
        sums = MeanSums(range(10), (1,), tuple(range(blocks)), width)
        for i in range(count):
            sums.take(found[:, i], items[i % 10])
        return sums

    def at_once(_: int) -> np.ndarray:
        rows = found[:, :, :-3].reshape(blocks, count // 10, 10, width).astype(np.float64)
        mean: np.ndarray = rows.mean(axis=1)
        return mean

    error = float(np.abs(add(0).mean[0].swapaxes(0, 1) - at_once(0)).max())
    times = in_turns({"sums": add, "mean": at_once}, seconds=5.0, most=10)
    mine, other = times["sums"] / count, times["mean"] / count
    return Row(
        case="sums of one stimulus on the host",
        shape={"blocks": blocks, "d": width},
        dtype="fp64",
        threads=1,
        **spread(mine),
        floor_ms=None,
        floor_bytes=None,
        percent_of_floor=None,
        baseline="numpy's mean of all rows at once, without spread",
        baseline_ms=float(np.median(other)) * 1e3,
        ratio=against(mine, other),
        peak_memory_mb=None,
        check=Check(error <= 1e-12, f"mean in one go: {error:.1e}"),
    )


def extrapolate(share: float, sums_s: float) -> dict[str, Any]:
    """Calculate the time of a full harvest on eight GPUs from the assumptions and two measured figures."""
    a = ASSUMED
    pairs = a["concepts"] * a["pairs_a_concept"]
    used = (a["last_block_read"] + 1) / a["blocks_of_model"]
    speed = a["gpu_peak_flop_a_second"] * a["share_of_peak"] * share
    found = {}
    for kind in ("text", "picture"):
        flop = 2 * a["model_parameters"] * used * a[f"{kind}_tokens"]
        host = sums_s
        if kind == "picture":
            flop += a["vision_flop_a_picture"]
            host += a["cpu_seconds_to_prepare_a_picture"] / a["cpu_threads_a_gpu"]
        # The host's work is done while the device runs; whichever is slower decides.
        each = max(flop / speed, host)
        found[kind] = {
            "flop_a_stimulus": flop,
            "device_seconds_a_stimulus": flop / speed,
            "host_seconds_a_stimulus": host,
            "stimuli_per_s_a_gpu": 1 / each,
            "minutes_for_all_on_all_gpus": pairs * each / a["gpus"] / 60,
        }
    return {
        "kind": "calculation; nothing of it was run on a GPU",
        "assumptions": ASSUMED,
        "measured": {"share_of_bare_forward": share, "sums_seconds_a_stimulus": sums_s},
        "pairs": pairs,
        "result": found,
    }


def rate_target(rows: list[Row]) -> Target:
    """Hold the rate against its goal."""
    rate = next(row for row in rows if row.case == "harvest of one shard")
    ratio = float(rate.extra["processor_ratio"])
    return Target("stimuli a processor second, of the bare's", "≥ 90 %", f"{100 * ratio:.0f} %", ratio >= 0.9)


def memory_target(memory: list[dict[str, Any]]) -> Target:
    """Hold the memory against its goal."""
    peaks = [row["peak_mb"] for row in memory]
    growth = max(peaks) / peaks[0] - 1
    return Target(
        "peak memory over that of the fewest stimuli", "≤ 5 %", f"{100 * growth:+.1f} %", growth <= 0.05
    )


def curve(options: argparse.Namespace) -> int:
    """Weigh and time harvests of pocket-internvl alone; the largest is that of the method's authors."""
    stimuli = tuple(map(int, options.curve.split(","))) if options.curve else CURVE.memory_stimuli
    size = replace(CURVE, memory_stimuli=stimuli)
    settings = {"checkpoint": size.checkpoint, "memory_blocks": size.memory_blocks, "texts": size.texts}
    report = Report("harvest_curve", options.quick, settings)
    with tempfile.TemporaryDirectory(prefix="daco-rt-bench-") as folder:
        settings["memory"] = measure_memory(size, Path(folder))
    print_memory(settings["memory"])
    report.targets = [memory_target(settings["memory"])]
    standard = options.output == RESULTS / "harvest-rate.json"
    return report.finish(RESULTS / "harvest-curve.json" if standard else options.output)


def print_memory(rows: list[dict[str, Any]]) -> None:
    titles = tuple(rows[0])
    print_table(titles, [tuple(str(row[key]) for key in titles) for row in rows])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--curve",
        nargs="?",
        const="",
        metavar="LIST",
        help="only weigh and time pocket-internvl, at these numbers of stimuli, 27 a concept "
        "(default 10000,50000,100000,405000)",
    )


def main() -> int:
    options = arguments(__doc__, "harvest-rate", add_options)
    if options.curve is not None:
        return curve(options)
    size = QUICK if options.quick else FULL
    settings: dict[str, Any] = {
        "threads": [options.threads],
        "checkpoint": size.checkpoint,
        "blocks": size.blocks,
        "memory_blocks": size.memory_blocks,
    }
    report = Report(
        "harvest_rate",
        options.quick,
        settings,
        shown=("stimuli_per_s", "bare_stimuli_per_s", "processor_ratio"),
    )
    with tempfile.TemporaryDirectory(prefix="daco-rt-bench-") as folder:
        report.rows.extend(measure_rate(size, Path(folder), options.threads, settings))
        torch.set_num_threads(1)
        report.rows.append(measure_sums(size))
        settings["memory"] = measure_memory(size, Path(folder))
    print_memory(settings["memory"])
    rate, sums = report.rows[0], report.rows[1]
    settings["extrapolation"] = extrapolate(float(rate.extra["processor_ratio"]), sums.median_ms / 1e3)
    if not options.quick:
        report.targets = [rate_target(report.rows), memory_target(settings["memory"])]
    return report.finish(options.output)


if __name__ == "__main__":
    sys.exit(main())
