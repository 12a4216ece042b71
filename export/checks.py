"""The checks of a verification that need nothing but the bundle: bits, firing, planted rows, kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from daco_rt.artifacts.pack import Pack
from daco_rt.export.probe import KERNELS, Kernels, Probe, Stepper, Tap, taps_of
from daco_rt.export.report import Report
from daco_rt.ops.outcomes import CLOSE, Outcomes
from daco_rt.ops.reference import steer_affine
from daco_rt.runtime.positions import right_padded

Embed = Callable[[NDArray], NDArray]
"""Token ids [B, n] to embeddings [B, n, d]."""

# ‖z' − reference‖ / ‖z‖. fp32 sums over d terms lose about d·2⁻²⁴; fp16 results are rounded to 11 bits.
ROW_BOUND = {"fp32": 1e-5, "fp16": 1e-3}
KERNEL_BOUND = {"fp32": 1e-5, "fp16": 1e-3}


@dataclass(frozen=True)
class Batch:
    """Right-padded prompts as the decoder takes them."""

    embeds: NDArray  # [B, S, d]
    lengths: NDArray[np.int64]  # [B]
    slots: NDArray[np.int32]  # [B, S], of the prompt under the policy
    decoded: int  # slot of decoded tokens under the policy; 0 if it does not cover them

    @property
    def real(self) -> NDArray[np.bool_]:
        """True where a token stands, [B, S]."""
        return right_padded(self.lengths, self.embeds.shape[1])


@dataclass
class Run:
    """Greedy decoding of a batch, with everything that passed the steering nodes."""

    tokens: NDArray[np.int64]  # [B, steps]
    logits: list[NDArray]  # steps x [B, V]
    taps: list[list[Tap]] = field(default_factory=list)
    caches: Mapping[str, NDArray] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Rows that one block evaluated, and what may come of each: several results next to a discontinuity."""

    z: NDArray  # [T, d]
    slots: NDArray[np.int32]  # [T]
    outcomes: list[list[NDArray[np.float64]]]  # T x (one or more) x [d]

    @property
    def clear(self) -> NDArray[np.bool_]:
        """True for rows that have only one result, [T]."""
        return np.array([len(results) == 1 for results in self.outcomes], bool)

    def errors(self, out: NDArray) -> NDArray[np.float64]:
        """Distance of each row of ``out`` [T, d] from the nearest permitted result, relative to ‖z‖."""
        found = np.zeros(len(self.z))
        for t, (row, got) in enumerate(zip(self.z, out.astype(np.float64), strict=True)):
            length = max(float(np.linalg.norm(row.astype(np.float64))), 1e-30)
            found[t] = min(float(np.linalg.norm(got - result)) for result in self.outcomes[t]) / length
        return np.where(np.isfinite(found), found, np.inf)


def evaluate(pack: Pack, block: int, z: NDArray, slots: NDArray) -> Rows:
    """Work out what the float64 reference permits for each row."""
    if pack.op == "affine":  # continuous: one result a row
        return Rows(
            z, slots, [[row] for row in steer_affine(z, slots, **pack.operands(block), phi=pack.coder).z]
        )
    outcomes = Outcomes(
        pack.operands(block),
        coder=pack.coder,
        k=pack.k,
        sign=pack.sign,
        tol=pack.tol,
        tau=pack.tau,
        alpha=pack.alpha,
    )
    return Rows(z, slots, [outcomes(row, int(slot)) for row, slot in zip(z, slots, strict=True)])


def decode_greedily(
    stepper: Stepper,
    batch: Batch,
    embed: Embed,
    steps: int,
    slot: int | None,
    blocks: Iterable[int] = (),
) -> Run:
    """Prefill and decode ``steps`` tokens a row; ``slot`` replaces the slots of every real token."""
    b, width, _ = batch.embeds.shape
    slots = batch.slots if slot is None else np.where(batch.real, slot, 0)
    after = np.full((b, 1), batch.decoded if slot is None else slot)
    order = np.broadcast_to(np.arange(width), (1, b, width))
    blocks = list(blocks)
    out = stepper.step(batch.embeds, order, np.zeros(b), slots, batch.lengths[:, None] - 1)
    run = Run(np.zeros((b, steps), np.int64), [])
    at = batch.lengths.copy()
    for t in range(steps):
        run.logits.append(out["logits"][:, 0])
        run.taps.append(taps_of(out, blocks))
        run.tokens[:, t] = out["logits"][:, 0].argmax(-1)
        if t + 1 == steps:
            break
        embeds = embed(run.tokens[:, t : t + 1])
        out = stepper.step(embeds, at[None, :, None], at, after, np.zeros((b, 1)))
        at = at + 1
    run.caches = stepper.past
    return run


def check_bits(report: Report, probe: Probe, batch: Batch, embed: Embed, kernels: Kernels) -> None:
    """Slots 0 and 1 change nothing: logits and caches equal the unsteered graph's, bit for bit."""
    steps = 8
    cache = int(batch.lengths.max()) + steps
    plain = decode_greedily(Stepper(probe.session(probe.unsteered(), kernels), cache), batch, embed, steps, 0)
    steered = probe.session(probe.graph, kernels)
    for slot, name in ((0, "slot 0 (off)"), (1, "slot 1 (observe)")):
        run = decode_greedily(Stepper(steered, cache), batch, embed, steps, slot)
        different = sum(int((a != b).sum()) for a, b in zip(plain.logits, run.logits, strict=True))
        different += sum(int((plain.caches[name] != run.caches[name]).sum()) for name in plain.caches)
        values = sum(a.size for a in plain.logits) + sum(a.size for a in plain.caches.values())
        report.add(
            f"{name} changes nothing",
            different == 0,
            f"{different} of {values} logits and cache values differ from the unsteered graph",
            "0, bit for bit",
        )


def check_firing(report: Report, run: Run, batch: Batch, pack: Pack, precision: str) -> dict[int, Rows]:
    """Every covered token was evaluated under its slot at each block, and equals the reference.

    Returns the evaluated rows of each block for further checks.
    """
    rows_of: dict[int, Rows] = {}
    missed = expected = edited = close = compared = 0
    worst = worst_close = 0.0
    for index, block in enumerate(pack.blocks):
        for t, step in enumerate(run.taps):
            wanted = pack.slot_map[index][batch.slots.reshape(-1) if t == 0 else batch.decoded]
            expected += int(np.broadcast_to(wanted != 0, step[index].slots.shape).sum())
            missed += int((step[index].slots != wanted).sum())
        z = np.concatenate([step[index].z for step in run.taps])
        slots = np.concatenate([step[index].slots for step in run.taps])
        out = np.concatenate([step[index].out for step in run.taps])
        doses = np.concatenate([step[index].doses for step in run.taps])
        on = slots != 0
        missed += int(np.isnan(doses[on]).any(axis=1).sum())
        edited += int((doses[on, 1] > 0).sum())
        rows_of[block] = rows = evaluate(pack, block, z[on], slots[on])
        errors = rows.errors(out[on])
        compared += len(errors)
        close += int((~rows.clear).sum())
        worst = max(worst, float(errors[rows.clear].max(initial=0.0)))
        worst_close = max(worst_close, float(errors[~rows.clear].max(initial=0.0)))
    report.add(
        f"steering fires on every {'generated token' if batch.decoded else 'covered prompt token'}",
        missed == 0 and expected > 0,
        f"{expected - missed} of {expected} rows evaluated under their slot, {edited} of them edited",
        "all",
    )
    report.add(
        "rows equal the float64 reference",
        worst <= ROW_BOUND[precision],
        f"largest error {worst:.1e} of ‖z‖ over {compared} rows",
        f"≤ {ROW_BOUND[precision]:.0e}",
    )
    report.add(
        "rows next to a discontinuity",
        worst_close <= ROW_BOUND[precision],
        f"{close} of {compared} within {CLOSE:g} of one, largest error {worst_close:.1e}",
        f"equal to one side, ≤ {ROW_BOUND[precision]:.0e}",
    )
    return rows_of


def check_planted(
    report: Report,
    probe: Probe,
    pack: Pack,
    rows_of: Mapping[int, Rows],
    slot: int,
    kernels: Kernels,
    precision: str,
) -> None:
    """A row with a planted concept is edited, at every steered block, as the reference says."""
    failed: list[str] = []
    smallest, worst, blocks = np.inf, 0.0, 0
    for index, block in enumerate(pack.blocks):
        mapped = int(pack.slot_map[index, slot])
        if mapped < 2:
            continue
        operands = pack.operands(block)
        planted = plant(operands, rows_of[block].z, mapped)
        if planted is None:
            failed.append(f"block {block}: the policy edits nothing there")
            continue
        session = probe.session(probe.alone(block), kernels)
        kind = np.float16 if precision == "fp16" else np.float32
        row = planted.astype(kind)
        out = session.run(["out"], {"z": row[None, None], "slots": np.full((1, 1), mapped, np.int32)})[0]
        error = evaluate(pack, block, row[None], np.full(1, mapped)).errors(out[0])[0]
        change = float(
            np.linalg.norm(out[0, 0].astype(np.float64) - row) / np.linalg.norm(row.astype(np.float64))
        )
        smallest, worst, blocks = min(smallest, change), max(worst, error), blocks + 1
        if not change > 0 or error > ROW_BOUND[precision]:
            failed.append(f"block {block}: Δ = {change:.2e} ‖z‖, error {error:.1e}")
    report.add(
        "a planted concept is edited at every block",
        not failed and blocks > 0,
        "; ".join(failed) or f"{blocks} blocks, smallest ‖Δ‖ = {smallest:.3f} ‖z‖, error ≤ {worst:.1e}",
        "Δ ≠ 0 and equal to the reference",
    )


def plant(operands: Mapping[str, NDArray], rows: NDArray, slot: int) -> NDArray[np.float64] | None:
    """Return a real row to which the first concept that ``slot`` edits was added, strongly enough to be on.

    Without an edited code but with a shift, any row will do; ``None`` if the policy edits nothing.
    """
    base = np.asarray(rows[0], np.float64) if len(rows) else np.ones(operands["shift"].shape[1])
    if "a" in operands:
        a, b = (np.asarray(operands[name][slot]).astype(np.float64) for name in ("a", "b"))
        moves = np.flatnonzero(a.any(axis=1) & b.any(axis=0))
        if not moves.size:
            return base if np.asarray(operands["shift"][slot]).any() else None
        return base + a[moves[0]] * (2 * np.linalg.norm(base) / np.linalg.norm(a[moves[0]]))
    boost = operands.get("boost")
    gain = np.asarray(operands["gain"][slot])
    edited = np.flatnonzero(
        (gain != 1) | (0 if boost is None or not boost.size else np.asarray(boost[slot]) != 0)
    )
    if not edited.size:
        return base if np.asarray(operands["shift"][slot]).any() else None
    atom = np.asarray(operands["dec" if "dec" in operands else "atoms"][edited[0]]).astype(np.float64)
    theta = float(operands["limits"][slot, 0])
    length = max(4 * theta, 2 * float(np.linalg.norm(base)))
    return base + atom * (length / max(float(np.linalg.norm(atom)), 1e-12))


def check_kernels_agree(
    report: Report, probe: Probe, pack: Pack, rows_of: Mapping[int, Rows], precision: str
) -> None:
    """The custom-op library and the model-local functions give the same rows on the same file."""
    worst = 0.0
    total = 0
    for block, rows in rows_of.items():
        if not len(rows.z):
            continue
        kind = np.float16 if precision == "fp16" else np.float32
        feeds = {"z": rows.z[None].astype(kind), "slots": rows.slots[None].astype(np.int32)}
        library, functions = (
            probe.session(probe.alone(block), kernels).run(["out"], feeds)[0][0].astype(np.float64)
            for kernels in KERNELS
        )
        scale = np.maximum(np.abs(functions).max(axis=1), 1e-30)
        difference = (np.abs(library - functions).max(axis=1) / scale)[rows.clear]
        worst, total = max(worst, float(difference.max(initial=0.0))), total + len(difference)
    report.add(
        "library and functions agree",
        worst <= KERNEL_BOUND[precision],
        f"largest relative difference {worst:.1e} over {total} rows",
        f"≤ {KERNEL_BOUND[precision]:.0e}",
    )
