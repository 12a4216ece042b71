"""One decoded token of smol-internvl in ONNX Runtime: what does steering cost?

    python benchmarks/smol_steered.py            # about six minutes, 6 GB
    python benchmarks/smol_steered.py --quick    # the same on pocket-internvl and small packs

Every row is paired with the same model exported without a pack, at one prompt length and cache, and each step
starts with cold caches. Packs: the built-in one (320 concepts) off and on, and synthetic ones of 15,000 atoms
at five blocks, coded by matching pursuit (k = 16) and by a TopK SAE (k = 32), in fp32, bf16 and fp16. Floor
of the extra time: a one-pass sum of as many bytes as one dictionary a block has, in the same rounds.
"""

from __future__ import annotations

import contextlib
import gc
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from harness import Check, Report, Row, Target, arguments, resident_mb, return_free_memory
from references import DOSE_BOUND, check_pursuit, pursuit_residuals
from timing import Reader, against, in_turns, spread
from workloads import SLOT, coherent_dictionary, removing_policy

from daco_rt._machine import cores
from daco_rt.artifacts import Concept, Pack, Policy, load_bundle, save_pack
from daco_rt.export import export_model
from daco_rt.export.probe import Probe, Stepper, taps_of
from daco_rt.models import Checkpoint, model_identity, resolve_checkpoint
from daco_rt.ops import reference
from daco_rt.ops.outcomes import Outcomes
from daco_rt.runtime.cache import KvCache
from daco_rt.runtime.onnx_session import OnnxSession

TEXT = (
    "A safety team builds a dictionary of concepts for its model once, labels what must not surface, and "
    "exports the model. From then on every generated token is decomposed over thousands of concepts, and the "
    "undesirable part is removed before the next block reads it. The rest of the stream stays as it was. "
) * 4
NUMPY = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
ONE_ROW = 3
"""Times as many pairs where one row is decoded: the targets stand on their differences, which are noisy."""
CODERS = {"topk": ("sae", 32), "omp": ("pursuit", 16)}


@dataclass(frozen=True)
class Size:
    """Model, packs and how long it is measured."""

    checkpoint: str
    blocks: tuple[int, ...]
    atoms: int
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    prompt: int
    cache: int
    seconds: float
    rounds: int
    cold: bool


FULL = Size(
    "smol-internvl", tuple(range(15, 20)), 15_000, ("fp32", "bf16", "fp16"), (1, 8), 64, 128, 6.0, 25, True
)
QUICK = Size("pocket-internvl", (2, 3), 400, ("fp16",), (1, 2), 16, 32, 0.1, 3, False)


@dataclass(frozen=True)
class Variant:
    """One bundle under one slot."""

    name: str
    bundle: Path
    slot: int
    dtype: str


class Decoding:
    """A session with a prompt in its cache, ready to decode the same token again and again."""

    def __init__(self, session: OnnxSession, ids: np.ndarray, cache: int) -> None:
        # The prompt is read under slot 0, so the first steered block sees the same row in every bundle.
        self.session, self.batch, self.prompt = session, len(ids), ids.shape[1] - 1
        self.next = ids[:, -1]
        self.cache: KvCache = session.new_cache(self.batch, cache)
        prompt = session.embed(ids[:, :-1])
        session.prefill(self.cache, prompt, np.zeros(ids[:, :-1].shape, int), [self.prompt] * self.batch)

    def step(self, slot: int) -> Any:
        """Decode the token after the prompt under ``slot``."""
        self.cache.lengths[:] = self.prompt
        self.cache.next_position[:] = self.prompt
        return self.session.decode(self.cache, self.next, np.full(self.batch, slot))


def prompts(bundle: Path, batch: int, length: int) -> np.ndarray:
    """Token ids [B, length + 1] of one text, each row starting at another word."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(bundle / "processor" / "tokenizer.json")).encode(TEXT).ids
    return np.array([ids[3 * row : 3 * row + length + 1] for row in range(batch)])


def synthetic_pack(path: Path, model: Checkpoint, coder: str, dtype: str, size: Size) -> Pack:
    """Write a pack of coherent dictionaries, a different one for each block."""
    op, k = CODERS[coder]
    first, second = ("enc", "dec") if op == "sae" else ("analysis", "atoms")
    bias = "enc_bias" if op == "sae" else "bias"
    operands: dict[int, dict[str, np.ndarray]] = {}
    for block in size.blocks:
        atoms = coherent_dictionary(size.atoms, model.decoder.hidden_size, seed=block)
        stored = atoms.astype(NUMPY[dtype])
        tables = removing_policy(atoms, 1.0, deadband=0.0)
        operands[block] = {first: stored, bias: np.zeros(size.atoms, np.float32), second: stored}
        operands[block] |= tables.operands()
    bad = tables.undesirable[SLOT]
    return save_pack(
        path,
        model=model_identity(model),
        op=op,
        coder=coder,
        k=k,
        k_out=k,
        operands=operands,
        policies=[Policy("default", SLOT, "all", size.blocks)],
        default_policy="default",
        concepts=[Concept(i, f"atom {i}", "undesirable" if bad[i] else "neutral") for i in range(size.atoms)],
        median_norm=dict.fromkeys(size.blocks, 1.0),
    )


def export(size: Size, checkpoint: str | Path, output: Path, pack: Path | None = None) -> Path:
    """Export a bundle without its vision tower and without chatter."""
    with contextlib.redirect_stderr(io.StringIO()):
        export_model("internvl", checkpoint=checkpoint, pack=pack, output=output, vision=False)
    return output


# ---- is it right?


def rows_before_steering(bundle: Path, block: int, ids: np.ndarray, cache: int) -> np.ndarray:
    """The residual rows [B, d] that enter ``block`` when the token after the prompt is decoded."""
    probe = Probe(load_bundle(bundle, verify=False))
    stepper = Stepper(probe.session(probe.tapped(), "library"), cache)
    session = OnnxSession(bundle, verify=False)
    batch, length = len(ids), ids.shape[1] - 1
    zeros = np.zeros((batch, 1), int)
    positions = np.broadcast_to(np.arange(length), (1, batch, length))
    stepper.step(
        session.embed(ids[:, :-1]), positions, zeros[:, 0], np.zeros((batch, length), int), zeros + length - 1
    )
    out = stepper.step(
        session.embed(ids[:, -1:]), np.full((1, batch, 1), length), zeros[:, 0] + length, zeros, zeros
    )
    return taps_of(out, [block])[0].z


def check_off(step: Any, plain: Any) -> Check:
    """Slot 0 must leave every logit as the unsteered graph has it."""
    different = int((step.logits != plain.logits).sum())
    return Check(different == 0, f"{different} of {plain.logits.size} logits differ from the unsteered graph")


def check_steered(step: Any, pack: Pack, z: np.ndarray, judged: int) -> Check:
    """Codes and doses of the first steered block against float64, and life signs of all the others."""
    alive = all(np.isfinite(rows.doses).all() for rows in step.reports.values())
    alive = alive and bool(np.isfinite(step.logits).all())
    report = step.reports[pack.blocks[0]]
    doses, index, value = report.doses[:, 0], report.support_index[:, 0], report.support_value[:, 0]
    operands = pack.operands(pack.blocks[0])
    if "gram" in operands or pack.coder != "omp":
        check = check_doses(doses, operands, pack, z)
    else:
        atoms = operands["atoms"].astype(np.float32)
        tables = removing_policy(atoms, 1.0, deadband=0.0)
        best = pursuit_residuals(z[:judged], atoms, pack.k)
        check = check_pursuit(None, doses, index, value, z, atoms, tables, best)
    return Check(check.passed and alive, f"block {pack.blocks[0]}: {check.detail}")


def check_doses(doses: np.ndarray, operands: Any, pack: Pack, z: np.ndarray) -> Check:
    """Doses against the float64 reference, on rows that stand next to no cliff."""
    slots = np.full(len(z), SLOT)
    outcomes = Outcomes(operands, coder=pack.coder, k=pack.k)
    clear = np.array([outcomes.clear(row, SLOT) for row in z])
    steer: Callable[..., Any] = reference.steer_sae if pack.op == "sae" else reference.steer_pursuit
    named = {name: a for name, a in operands.items() if a.size}
    if pack.op == "pursuit":
        named.pop("gram", None)
    expected = steer(z, slots, **named, coder=pack.coder, k=pack.k).doses
    worst = float(np.abs(doses - expected)[clear].max(initial=0))
    return Check(
        worst <= DOSE_BOUND and bool(clear.any()),
        f"doses of {int(clear.sum())} of {len(z)} rows equal float64 within {worst:.1e}",
    )


# ---- how long does it take?


def measure(
    size: Size, threads: int, reader: Reader, plain: Path, variants: Iterator[Variant]
) -> Iterator[Row]:
    """Yield a row for each variant and batch, each in turns with the unsteered graph."""
    ids = {batch: prompts(plain, batch, size.prompt) for batch in size.batches}
    unsteered = OnnxSession(plain, threads=threads, verify=False)
    base = {batch: Decoding(unsteered, ids[batch], size.cache) for batch in size.batches}
    entering: dict[int, np.ndarray] = {}
    for variant in variants:
        pack = load_bundle(variant.bundle, verify=False).pack()
        assert pack is not None  # every variant is exported with one
        if not entering:
            first = pack.blocks[0]
            entering = {b: rows_before_steering(variant.bundle, first, ids[b], size.cache) for b in ids}
        yield from measure_variant(size, threads, reader, variant, pack, base, ids, entering)
        gc.collect()


def measure_variant(
    size: Size,
    threads: int,
    reader: Reader,
    variant: Variant,
    pack: Pack,
    base: dict[int, Decoding],
    ids: dict[int, np.ndarray],
    entering: dict[int, np.ndarray],
) -> Iterator[Row]:
    """Open one bundle, check it and time it; its session is gone when this returns."""
    import torch

    gc.collect()
    return_free_memory()
    before, began = resident_mb(), time.perf_counter()
    session = OnnxSession(variant.bundle, threads=threads, verify=False)
    opening = time.perf_counter() - began
    slot = variant.slot
    for batch in size.batches:
        steered, other = Decoding(session, ids[batch], size.cache), base[batch]
        step = steered.step(slot)
        if slot == 0:
            check = check_off(step, other.step(0))
        else:
            check = check_steered(step, pack, entering[batch], judged=2)
        return_free_memory()
        memory = resident_mb() - before
        nbytes = len(pack.blocks) * pack.atoms * pack.dim * NUMPY[pack.dtype].itemsize
        functions: dict[str, Callable[[int], object]] = {
            "steered": lambda _, s=steered: s.step(slot),
            "unsteered": lambda _, s=other: s.step(0),
        }
        if slot:
            functions["floor"] = lambda _, n=nbytes: reader.read(n, threads)
        reader.way(threads)
        torch.set_num_threads(threads)
        times = in_turns(
            functions,
            seconds=size.seconds * (ONE_ROW if batch == 1 else 1),
            least=min(5, size.rounds),
            most=size.rounds * (ONE_ROW if batch == 1 else 1),
            before=reader.evict,
        )
        yield row_of(variant, pack, batch, threads, times, nbytes, check, opening, memory)


def row_of(
    variant: Variant,
    pack: Pack,
    batch: int,
    threads: int,
    times: dict[str, np.ndarray],
    nbytes: int,
    check: Check,
    opening: float,
    memory: float,
) -> Row:
    """Turn paired times into a row; the extra time is the median of the pairs' differences."""
    mine, other, floor = times["steered"], times["unsteered"], times.get("floor")
    low, extra, high = np.quantile(mine - other, (0.1, 0.5, 0.9)) * 1e3
    floor_ms = None if floor is None else float(np.median(floor)) * 1e3
    more: dict[str, float | int | str] = {
        "extra_ms": float(extra),
        "extra_p10_ms": float(low),
        "extra_p90_ms": float(high),
        # Of the median, by the spread of the pairs.
        "extra_error_ms": float(1.2533 * (high - low) / 2.5631 / np.sqrt(len(mine))),
        "extra_percent": float(100 * np.median((mine - other) / other)),
        "session_seconds": opening,
    }
    if floor_ms is not None:
        more["extra_over_floor"] = float(extra) / floor_ms
    row = Row(
        case=variant.name,
        shape={"B": batch, "N": pack.atoms, "d": pack.dim, "k": pack.k, "blocks": len(pack.blocks)},
        dtype=variant.dtype,
        threads=threads,
        **spread(mine),
        floor_ms=floor_ms,
        floor_bytes=None if floor is None else nbytes,
        percent_of_floor=None if floor_ms is None or extra <= 0 else 100 * floor_ms / float(extra),
        baseline="unsteered graph",
        baseline_ms=float(np.median(other)) * 1e3,
        ratio=against(mine, other),
        peak_memory_mb=memory,
        check=check,
        extra=more,
    )
    print(
        f"  {row.case} {row.dtype} B={batch}: {row.median_ms:.2f} ms, unsteered {row.baseline_ms:.2f}, "
        f"extra {extra:+.2f} ({low:+.2f} to {high:+.2f})",
        file=sys.stderr,
    )
    return row


def variants(size: Size, model: Checkpoint, scratch: Path) -> Iterator[Variant]:
    """Export one bundle after another; each is gone when the next one is asked for."""
    built_in = export(size, size.checkpoint, scratch / "default")
    dtype = load_bundle(built_in, verify=False).pack().dtype  # type: ignore[union-attr]
    yield Variant("policy off", built_in, 0, dtype)
    yield Variant("default pack, omp", built_in, SLOT, dtype)
    for coder in CODERS:
        for dtype in size.dtypes:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                pack = synthetic_pack(Path(folder) / "pack", model, coder, dtype, size)
                bundle = export(size, size.checkpoint, Path(folder) / "bundle", pack.path)
                yield Variant(f"synthetic pack, {coder}", bundle, SLOT, dtype)


def targets(rows: list[Row]) -> list[Target]:
    """The goal for each synthetic pack at batch 1."""
    found = []
    for row in rows:
        if row.case.startswith("synthetic") and row.shape["B"] == 1:
            times = float(row.extra["extra_over_floor"])
            name = f"extra time, {row.case}, {row.dtype}, over its dictionary's bytes"
            found.append(Target(name, "≤ 1.3 ×", f"{times:.2f} ×", times <= 1.3))
    return found


def main() -> int:
    options = arguments(__doc__, "smol_steered")
    size, threads = (QUICK if options.quick else FULL), cores()
    print(f"threads: {threads}; {size.checkpoint}, prompt {size.prompt}, cache {size.cache}", flush=True)
    model = resolve_checkpoint("internvl", size.checkpoint)
    reader = Reader(len(size.blocks) * size.atoms * model.decoder.hidden_size * 4, cold=size.cold)
    settings: dict[str, Any] = {
        "model": size.checkpoint,
        "threads": [threads],
        "activations": "fp32",
        "blocks": list(size.blocks),
        "prompt": size.prompt,
        "cache": size.cache,
        "floor": "one-pass sum of the dictionaries' bytes (one matrix a block), same threads, same rounds",
        "memory": "what opening the steered session and its cache added",
    }
    report = Report(
        "smol_steered", options.quick, settings, shown=("extra_ms", "extra_percent", "extra_over_floor")
    )
    with tempfile.TemporaryDirectory(prefix="daco-rt-bench-") as folder:
        scratch = Path(folder)
        # A folder, unlike a built-in name, brings no pack of its own.
        plain = export(size, model.path, scratch / "plain")
        report.rows.extend(measure(size, threads, reader, plain, variants(size, model, scratch)))
    settings["floor_read_by"] = {str(threads): reader.way(threads)}
    if not options.quick:
        report.targets = targets(report.rows)
    return report.finish(options.output)


if __name__ == "__main__":
    sys.exit(main())
