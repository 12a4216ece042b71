"""What steering costs a 7B-shaped decoder, a token.

    python benchmarks/gpu/decoder_7b.py             # about five minutes, 30 GB of GPU memory
    python benchmarks/gpu/decoder_7b.py --batch 1   # half of that
    python benchmarks/gpu/decoder_7b.py --compact   # fewer rounds
    python benchmarks/gpu/decoder_7b.py --tune      # the compiler searches for its tiles: minutes more
    python benchmarks/gpu/decoder_7b.py --quick     # a tiny decoder; runs on the CPU too

28 blocks of width 3,584 with random bf16 weights, static cache, one token a step in a CUDA graph, batch 1
and 16, five steered blocks over 15,000 atoms each. Compared: unsteered; addition of a vector (ActAdd);
edited latents only (ReLU SAE); exact TopK SAE in bf16 and fp8; orthogonal matching pursuit; and the TopK
SAE as hooks in plain PyTorch, as the paper's method would be written. Every step is timed in turns with the
unsteered one. Floor: the decoder's weights and cache, read once at the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import measure
import numpy as np
import torch
from decoder import TINY, Decoder, Shape, Steer
from torch import Tensor

# isort: split
import baselines
from harness import Check, Report, Row, Target, arguments
from timing import against, spread
from workloads import SLOT, PolicyTables, coherent_dictionary, removing_policy

import daco_rt.ops as ops

UNSTEERED = "unsteered"
REPLAY_BOUND = 1e-2
"""Of the logits' norm: a matrix library may choose otherwise while a graph is captured."""


@dataclass(frozen=True)
class Size:
    """How large everything is and how often it is timed."""

    shape: Shape
    atoms: int
    k: int
    steered: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int


FULL = Size(Shape(), 15_000, 32, (15, 16, 17, 18, 19), (1, 16), 60)
COMPACT = replace(FULL, rounds=20)
QUICK = Size(TINY, 200, 4, (1, 2), (1, 2), 3)


class Steering:
    """Dictionaries of the steered blocks, and every method as an edit of a block's output."""

    def __init__(self, size: Size, batch: int, rows: Tensor, device: torch.device) -> None:
        self.size, self.device = size, device
        atoms = coherent_dictionary(size.atoms, size.shape.dim)
        norm = float(rows.norm(dim=1).median())
        self.tables: PolicyTables = removing_policy(atoms, norm)
        self.operands = {name: torch.from_numpy(a).to(device) for name, a in self.tables.operands().items()}
        self.slots = torch.full((batch,), SLOT, dtype=torch.int32, device=device)
        self.bias = torch.zeros(size.atoms, device=device)
        first = torch.from_numpy(atoms).to(device).bfloat16()
        # A copy a block: a decoder's blocks have dictionaries of their own.
        self.atoms = {number: first.clone() for number in size.steered}
        self.first = first
        # ReLU SAEs are sparse: one latent in fifty is above the bias of theirs.
        highest = float(np.quantile((rows @ first.float().T).cpu().numpy(), 0.98))
        self.sparse_bias = torch.full((size.atoms,), -highest, device=device)

    def methods(self) -> dict[str, Callable[[int], Steer]]:
        """Name → the edit of a block, which makes what it needs beyond the dictionaries when it is asked."""
        found: dict[str, Callable[[int], Steer]] = {
            "ActAdd": self.act_add,
            "edited latents only": self.edited_only,
            "TopK bf16": self.topk,
        }
        if measure.on_gpu(self.device):
            found["TopK fp8"] = self.topk_fp8  # the CPU has no fp8 kernels
        return found | {"OMP": self.pursuit, "TopK, PyTorch hooks": self.hooks}

    def act_add(self, block: int) -> Steer:
        """Add the policy's shift."""
        nothing = torch.zeros(1, self.size.shape.dim, device=self.device, dtype=torch.bfloat16)
        tables = {name: a[:, :1] if a.shape[1] == self.size.atoms else a for name, a in self.operands.items()}
        tables = {name: a.contiguous() for name, a in tables.items()}
        bias = self.bias[:1]
        return lambda h: ops.steer_sae(h, self.slots, nothing, bias, nothing, coder="none", **tables).z

    def edited_only(self, block: int) -> Steer:
        """ReLU SAE of which only the latents that the policy edits are computed."""
        return self._sae(self.atoms[block], None, "relu")

    def topk(self, block: int) -> Steer:
        """Exact TopK SAE, weights in bf16."""
        return self._sae(self.atoms[block], None, "topk")

    def topk_fp8(self, block: int) -> Steer:
        """Exact TopK SAE, weights in fp8 with a scale an atom."""
        wide = self.first.float()
        scale = wide.abs().amax(dim=1) / 448
        stored = (wide / scale[:, None]).to(torch.float8_e4m3fn)
        return self._sae(stored, torch.stack((scale, scale)), "topk")

    def _sae(self, atoms: Tensor, scales: Tensor | None, coder: str) -> Steer:
        call = partial(ops.steer_sae, coder=coder, k=self.size.k, scales=scales, **self.operands)
        bias = self.bias if coder == "topk" else self.sparse_bias
        return lambda h: call(h, self.slots, atoms, bias, atoms).z

    def pursuit(self, block: int) -> Steer:
        """Orthogonal matching pursuit on an fp16 Gram matrix."""
        e = self.atoms[block]
        call = partial(
            ops.steer_pursuit, gram=ops.build_gram(e, e, torch.float16), k=self.size.k, **self.operands
        )
        return lambda h: call(h, self.slots, e, self.bias, e).z

    def hooks(self, block: int) -> Steer:
        """The TopK SAE in plain PyTorch."""
        atoms = self.atoms[block]
        gain, shift = self.operands["gain"][SLOT].bfloat16(), self.operands["shift"][SLOT].bfloat16()
        edit = baselines.Edit(
            gain, shift, float(self.tables.limits[SLOT, 0]), atoms.float().norm(dim=1).bfloat16()
        )
        bias = self.bias.bfloat16()
        return lambda h: baselines.topk(h, atoms, bias, atoms, edit, self.size.k)


def judge(decoder: Decoder, edits: Mapping[int, Steer], plain: Tensor, name: str) -> Check:
    """Whether the step that was just replayed gave finite logits, other ones than the unsteered step, and
    those of the same step run kernel by kernel."""
    replayed = decoder.logits.float().clone()
    finite = bool(replayed.isfinite().all())
    moved = float((replayed - plain).norm() / plain.norm())
    decoder.step(edits)
    apart = float((decoder.logits.float() - replayed).norm() / plain.norm())
    return Check(
        finite and moved > 0 and apart <= REPLAY_BOUND,
        f"{name}: logits {'finite' if finite else 'NOT FINITE'}, {moved:.1e} of their norm moved; "
        f"replayed and launched one by one they are {apart:.1e} apart",
    )


@torch.inference_mode()
def rows_of(size: Size, decoder: Decoder, device: torch.device, bandwidth: float) -> Iterator[Row]:
    """Capture a graph a method and time each in turns with the unsteered step."""
    batch = decoder.batch
    probe: dict[int, Tensor] = {}

    def look(h: Tensor) -> Tensor:
        probe[0] = h.float()
        return h

    decoder.step({size.steered[0]: look})
    steering = Steering(size, batch, probe[0], device)
    base = measure.Replay([lambda: decoder.step({})], device)
    base.run()
    plain = decoder.logits.float().clone()
    floor_bytes = decoder.floor_bytes()
    floor = floor_bytes / bandwidth
    for name, make in {UNSTEERED: None, **steering.methods()}.items():
        edits: Mapping[int, Steer] = {} if make is None else {number: make(number) for number in size.steered}
        replay = base if make is None else measure.Replay([partial(decoder.step, edits)], device)
        replay.run()
        check = Check(bool(plain.isfinite().all()), "logits finite")
        if make is not None:
            check = judge(decoder, edits, plain, name)
        times = measure.in_turns({"base": base, "steered": replay}, rounds=size.rounds)
        mine, other = times["steered"], times["base"]
        extra = float(np.median(mine - other)) if make is not None else 0.0
        print(f"  B={batch} {name}: +{extra * 1e6:.1f} µs", file=sys.stderr, flush=True)
        yield Row(
            case=name,
            shape={"B": batch, "m": size.atoms, "d": size.shape.dim, "k": size.k},
            dtype="bf16",
            threads=1,
            **spread(mine),
            floor_ms=floor * 1e3,
            floor_bytes=floor_bytes,
            percent_of_floor=100 * floor / float(np.median(mine)),
            baseline=UNSTEERED,
            baseline_ms=float(np.median(other)) * 1e3,
            ratio=against(mine, other),
            peak_memory_mb=measure.peak_memory_mb(device),
            check=check,
            extra={
                "extra_us": extra * 1e6,
                "extra_percent": 100 * extra / float(np.median(other)),
                "extra_percent_of_floor": 100 * extra / floor,
            },
        )


def targets(rows: list[Row]) -> list[Target]:
    """Hold batch 1 against the goals."""
    one = {row.case: row for row in rows if row.shape["B"] == 1}

    def extra(case: str, bound: float) -> Target:
        row = one.get(case)
        value = None if row is None else float(row.extra["extra_us"])
        met = None if value is None else value <= bound
        return Target(
            f"{case}, extra a token", f"≤ {bound:g} µs", "" if value is None else f"{value:.0f} µs", met
        )

    base = one.get(UNSTEERED)
    share = None if base is None or base.percent_of_floor is None else base.percent_of_floor
    return [
        Target(
            "unsteered, of its floor", "≥ 80 %", "" if share is None else f"{share:.0f} %",
            None if share is None else share >= 80,
        ),
        extra("edited latents only", 40),
        extra("TopK fp8", 110),
        extra("TopK bf16", 180),
        extra("OMP", 400),
    ]  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the device, the batch, and how blocks are compiled."""
    measure.add_options(parser)
    parser.add_argument("--batch", type=int, help="only this many sequences (default: 1, then 16)")
    parser.add_argument(
        "--tune", action="store_true", help="let the compiler write and tune the products of one row itself"
    )
    parser.add_argument(
        "--eager",
        action="store_true",
        help="do not compile the blocks: far from the floor",
    )


def main() -> int:
    options = arguments(__doc__, "gpu_decoder_7b", add_options)
    device = torch.device(options.device)
    size = QUICK if options.quick else COMPACT if options.compact else FULL
    if options.batch is not None:
        size = replace(size, batches=(options.batch,))
    compiled = measure.on_gpu(device) and not options.eager
    bandwidth = measure.copy_bandwidth(device)
    settings: dict[str, Any] = {
        "threads": [1],
        **measure.describe(device),
        "layers": size.shape.layers,
        "steered_blocks": list(size.steered),
        "context": size.shape.context,
        "compiled_blocks": compiled,
        "tuned_blocks": compiled and options.tune,
        "copy_gb_s": round(bandwidth / 1e9, 1),
        "floor": "weights and cache read once at the copy bandwidth",
    }
    report = Report("gpu_decoder_7b", options.quick, settings, shown=("extra_us", "extra_percent"))
    for batch in size.batches:
        decoder = Decoder(size.shape, batch, device, compiled=compiled, tuned=options.tune)
        for row in rows_of(size, decoder, device, bandwidth):
            report.add(row, options.output)
    if not options.quick:
        report.targets = targets(report.rows)
    return report.finish(options.output)


if __name__ == "__main__":
    sys.exit(main())
