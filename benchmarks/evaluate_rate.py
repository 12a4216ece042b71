"""Batched evaluation: tokens a second of ``BundleSubject.answer`` against the bare session's loop.

    python benchmarks/evaluate_rate.py            # about ten minutes, smol-internvl
    python benchmarks/evaluate_rate.py --quick    # pocket-internvl, seconds

Harmless questions are answered greedily, without steering and under the default policy, alone and in batches.
An evaluation renders and tokenises prompts, chooses tokens, makes text, looks for stop strings and collects
what steering reports. Bare is what is left without all that: prepared embeddings and slots in, prefill, and
one decode step a token, chosen by ``argmax``, in the same batches, ended at the same tokens. Both count the
tokens of answers alone, not of rows that wait for the longest of their batch.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Check, Report, Row, Target, arguments
from timing import against, in_turns, spread

from daco_rt.evaluate.benchmarks import load_benchmark
from daco_rt.evaluate.subject import Ask, BundleSubject
from daco_rt.export import export_model
from daco_rt.runtime.generate import PreparedBatch
from daco_rt.runtime.positions import token_slots
from daco_rt.runtime.request import GenerateRequest

POLICIES = ("off", "default")
SHARE = 0.8
"""Least share of the bare loop's tokens a second."""


@dataclass(frozen=True)
class Size:
    """What is run."""

    checkpoint: str
    batches: tuple[int, ...]
    questions: int
    tokens: int
    seconds: float
    rounds: int


FULL = Size("smol-internvl", (1, 8), 16, 48, 60.0, 8)
QUICK = Size("pocket-internvl", (1, 2), 4, 4, 0.1, 2)


def prepare(subject: BundleSubject, asks: Sequence[Ask], policy: str, most: int) -> list[PreparedBatch]:
    """Render, tokenise and embed the questions in the batches of an evaluation."""
    size, generator = subject.batch_size, subject.generator
    requests = [GenerateRequest(ask.prompt, policy=policy, max_new_tokens=most) for ask in asks]
    return [generator.prepare_batch(requests[at : at + size]) for at in range(0, len(requests), size)]


def bare(subject: BundleSubject, batches: Sequence[PreparedBatch], most: int) -> list[list[int]]:
    """Generate with the session alone and return the tokens of each row."""
    session, answers = subject.generator.session, []
    ends = np.array(sorted(subject.processor.eos_token_ids))
    for batch in batches:
        rows = len(batch.lengths)
        slots = token_slots(
            [policy.slot for policy in batch.policies],
            [policy.positions for policy in batch.policies],
            np.ones((rows, 1), bool),
            prompt_lengths=batch.lengths,
            past_lengths=batch.lengths,
        )[:, 0]
        cache = session.new_cache(rows, batch.cache_length)
        step = session.prefill(cache, batch.embeds, batch.slots, batch.lengths)
        going = np.ones(rows, np.bool_)
        said: list[list[int]] = [[] for _ in range(rows)]
        while True:
            chosen = step.logits[:, -1].argmax(axis=-1)
            for row in np.flatnonzero(going):
                said[row].append(int(chosen[row]))
            going &= ~np.isin(chosen, ends) & (len(max(said, key=len)) < most)
            if not going.any():
                break
            step = session.decode(cache, chosen, np.where(going, slots, 0), active=going)
        answers += said
    return answers


def measure(bundle: Path, size: Size, threads: int) -> Iterator[Row]:
    """One row for each policy and batch size."""
    samples = load_benchmark("benign").part("all", limit=size.questions).samples
    asks = [Ask(sample.prompt) for sample in samples]
    for batch_size in size.batches:
        subject = BundleSubject(bundle, threads=threads, batch_size=batch_size)
        for policy in POLICIES:
            prepared = prepare(subject, asks, policy, size.tokens)
            answers = [a.token_ids for a in subject.answer(asks, policy=policy, max_new_tokens=size.tokens)]
            expected = bare(subject, prepared, size.tokens)
            same = sum(mine == other for mine, other in zip(answers, expected, strict=True))
            tokens = sum(map(len, answers))
            times = in_turns(
                {
                    "evaluation": lambda _, s=subject, p=policy: s.answer(
                        asks, policy=p, max_new_tokens=size.tokens
                    ),
                    "bare": lambda _, s=subject, b=prepared: bare(s, b, size.tokens),
                },
                seconds=size.seconds,
                least=min(3, size.rounds),
                most=size.rounds,
            )
            mine, other = times["evaluation"], times["bare"]
            yield Row(
                case=f"answers, policy {policy}",
                shape={"batch": batch_size, "questions": len(asks), "tokens": tokens},
                dtype="fp32",
                threads=threads,
                **spread(mine),
                floor_ms=None,
                floor_bytes=None,
                percent_of_floor=None,
                baseline="the session's prefill and decode steps alone",
                baseline_ms=float(np.median(other)) * 1e3,
                ratio=against(mine, other),
                peak_memory_mb=None,
                check=Check(same == len(asks), f"{same} of {len(asks)} answers are the bare loop's tokens"),
                extra={
                    "tokens_per_s": tokens / float(np.median(mine)),
                    "bare_tokens_per_s": tokens / float(np.median(other)),
                },
            )


def targets(rows: Sequence[Row]) -> list[Target]:
    """Hold every batched row against the goal."""
    found = []
    for row in rows:
        share = row.ratio or 0.0
        found.append(
            Target(
                f"{row.case}, batch {row.shape['batch']}: tokens a second, of the bare loop's",
                f"≥ {SHARE:.0%}",
                f"{share:.0%}",
                share >= SHARE,
            )
        )
    return found


def main() -> int:
    options = arguments(__doc__, "evaluate-rate", lambda p: p.add_argument("--threads", type=int, default=1))
    size = QUICK if options.quick else FULL
    report = Report(
        "evaluate_rate",
        options.quick,
        {"threads": [options.threads], "checkpoint": size.checkpoint, "max_new_tokens": size.tokens},
        shown=("tokens_per_s", "bare_tokens_per_s"),
    )
    with tempfile.TemporaryDirectory(prefix="daco-rt-bench-") as folder:
        bundle = Path(folder) / "bundle"
        export_model("internvl", checkpoint=size.checkpoint, output=bundle)
        report.rows.extend(measure(bundle, size, options.threads))
    if not options.quick:
        report.targets = targets(report.rows)
    return report.finish(options.output)


if __name__ == "__main__":
    sys.exit(main())
