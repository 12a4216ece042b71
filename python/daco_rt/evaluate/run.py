"""Running an evaluation: methods × benchmarks × seeds, one file of answers a cell, and every judge over each.

A run that was stopped goes on where it was; a repeated one does nothing. Answers, verdicts and divergences
are kept apart, so that a judge can be added without generating anything again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from daco_rt._files import write_json
from daco_rt.errors import DacoError
from daco_rt.evaluate.config import EvaluationConfig
from daco_rt.evaluate.judges import Verdict, make_judge
from daco_rt.evaluate.methods import Built, Method, drawn
from daco_rt.evaluate.provenance import provenance
from daco_rt.evaluate.rows import RowFile, read_rows
from daco_rt.evaluate.samples import Benchmark, Sample
from daco_rt.evaluate.subject import Answer, Subject
from daco_rt.evaluate.workshop import Workshop, ask_for, read_record
from daco_rt.progress import progress


@dataclass(frozen=True)
class Cell:
    """One file of answers. ``draw`` is the seed of a random control's draw, where there are several."""

    variant: str
    method: str
    strength: float | None
    benchmark: str
    seed: int
    draw: int | None = None

    @property
    def name(self) -> str:
        """The variant, or the draw of it that this is."""
        return drawn(self.variant, self.draw)

    @property
    def stem(self) -> str:
        """Where its rows lie, below ``answers`` and ``verdicts/{judge}``."""
        return f"{self.benchmark}/{self.name}-s{self.seed}"

    @property
    def plain(self) -> Cell:
        """The unsteered answers to the same questions under the same seed."""
        return Cell("none", "none", None, self.benchmark, self.seed)


@dataclass(frozen=True)
class Pending:
    """What a judge could not be asked about: ``count`` of ``total`` answers, and why for the first one."""

    judge: str
    part: str
    count: int
    total: int
    reason: str

    def __str__(self) -> str:
        return (
            f"judge '{self.judge}' could not be asked about {self.count} of {self.total} answers of part "
            f"'{self.part}', which are unjudged ({self.reason}); the same command again asks about these"
        )


class Evaluation:
    """An evaluation on disk.

    Parameters
    ----------
    config : what to run.
    workshop : where methods are made ready; by default one in the run's own folder.
    only : variants that run; by default all.
    packs : method → checksum of the pack that it must have; others are refused.

    Example
    -------
    >>> Evaluation(read_config("configs/evaluate.yaml")).run()                      # doctest: +SKIP
    """

    def __init__(
        self,
        config: EvaluationConfig,
        *,
        workshop: Workshop | None = None,
        only: Collection[str] | None = None,
        packs: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.output = config.output
        self.workshop = Workshop(config, config.output) if workshop is None else workshop
        self._only, self._packs = only, dict(packs or {})
        self.benchmarks: dict[str, Benchmark] = {
            name: self.workshop.benchmarks[name].part(
                config.part,
                dev=config.dev,
                seed=config.split_seed,
                limit=data.limits[config.part],
                skip=data.skips[config.part] or 0,
            )
            for name, data in config.benchmarks.items()
        }

    @property
    def cells(self) -> list[Cell]:
        """Every cell, the unsteered model's first."""
        return [
            Cell(variant, method.name, strength, benchmark, seed, draw)
            for method in self.config.methods.values()
            for variant, strength in self.variants(method).items()
            for benchmark in self.benchmarks
            for draw in method.draws
            for seed in self.config.seeds
        ]

    def variants(self, method: Method) -> dict[str, float | None]:
        """Return those variants of a method that run, with their strengths."""
        return {
            name: value for name, value in method.labels.items() if self._only is None or name in self._only
        }

    def run(self) -> None:
        """Generate, measure and judge whatever is missing.

        Raises
        ------
        DacoError
            A source is missing or does not fit, or the folder holds an evaluation under other settings.
        """
        self.workshop.check()
        self.output.mkdir(parents=True, exist_ok=True)
        self._describe()
        for method in self.config.methods.values():
            if not self._done(method):
                self._run_method(method)
        self.judge()

    def judge(self) -> None:
        """Let every judge speak about every answer that it has not seen, or could not be asked about."""
        for name, row in self.config.judges.items():
            options = {key: value for key, value in row.items() if key != "kind"}
            # Opened all, so that verdicts of a judge with other options are refused before anything is asked.
            files = {c: RowFile(self._file("verdicts", c, name), {"judge": dict(row)}) for c in self.cells}
            waiting = [cell for cell, rows in files.items() if not rows.complete]
            if not waiting:
                continue
            if row["kind"] == "endpoint":
                options.setdefault("cache", self.output / "verdicts" / f"{name}.cache.jsonl")
            judge = make_judge(row["kind"], options)
            with progress(f"judging by {name}", total=len(waiting)) as advance:
                for cell in waiting:
                    rows = files[cell]
                    rows.drop(_is_pending)
                    samples = [s for s in self.benchmarks[cell.benchmark].samples if s.id not in rows.rows]
                    answers = self.answers(cell)
                    verdicts = judge.judge(samples, [answers[s.id].text for s in samples])
                    rows.append(
                        {"id": s.id, **_heard(v, answers[s.id]).to_json()}
                        for s, v in zip(samples, verdicts, strict=True)
                    )
                    if not any(map(_is_pending, rows.rows.values())):
                        rows.finish()
                    advance(1)

    def judged(self, cell: Cell) -> bool:
        """Whether a cell has all its answers, and every judge's verdicts, pending ones too."""
        if not self._file("answers", cell).is_file():
            return False
        ids = {sample.id for sample in self.benchmarks[cell.benchmark].samples}
        return all(
            self._file("verdicts", cell, name).is_file() or ids <= set(self.verdicts(cell, name))
            for name in self.config.judges
        )

    def pending(self) -> list[Pending]:
        """Return what judges could not be asked about; these answers are unjudged, and `judge` asks again."""
        found = []
        total = sum(len(self.benchmarks[cell.benchmark].samples) for cell in self.cells)
        for name in self.config.judges:
            unfinished = [cell for cell in self.cells if not self._file("verdicts", cell, name).is_file()]
            verdicts = [v for cell in unfinished for v in self.verdicts(cell, name).values()]
            reasons = [verdict.reason for verdict in verdicts if verdict.pending]
            if reasons:
                found.append(Pending(name, self.config.part, len(reasons), total, reasons[0]))
        return found

    def answers(self, cell: Cell) -> dict[str, Answer]:
        """Return a cell's answers by the sample's id."""
        rows = RowFile(self._file("answers", cell), self._header(cell)).rows
        return {key: Answer(**{k: v for k, v in row.items() if k != "id"}) for key, row in rows.items()}

    def verdicts(self, cell: Cell, judge: str) -> dict[str, Verdict]:
        """Return a judge's verdicts about a cell by the sample's id."""
        path = self._file("verdicts", cell, judge)
        return {row.pop("id"): Verdict.from_json(row) for row in read_rows(path)}

    def divergences(self, cell: Cell) -> dict[str, list[float]] | None:
        """Return KL(unsteered ‖ steered) in nats by token of each unsteered answer; None if not asked."""
        path = self._file("divergence", cell)
        if cell.benchmark not in self.config.divergence or not path.is_file():
            return None
        return {row["id"]: row["nats"] for row in read_rows(path)}

    def neutral(self, method: str, variant: str, what: Literal["nats", "kl"]) -> list[list[float]] | None:
        """Return −ln p or KL(unsteered ‖ steered) by token of each neutral passage under a variant, draws one
        after the other; None if it was not measured (the divergence by versions before it was).
        """
        paths = [self._perplexity_file(drawn(variant, draw)) for draw in self.config.methods[method].draws]
        if not all(path.is_file() for path in paths):
            return None
        rows = [[row.get(what) for row in read_rows(path)] for path in paths]
        if any(values is None for row in rows for values in row):
            return None
        return [[nats for draw in passage for nats in draw] for passage in zip(*rows, strict=True)]

    def seconds(self, variant: str) -> list[tuple[float, float]] | None:
        """Return pairs of seconds a token, unsteered and under a variant (its first draw); None if they were
        not measured.
        """
        path = self._timing_file(variant)
        if not path.is_file():
            return None
        return [(row["off"], row["steered"]) for row in read_rows(path)]

    # ---- one method

    def _run_method(self, method: Method) -> None:
        built = self.workshop.build(method)
        checksum = built.checksum
        if self._packs.get(method.name, checksum) != checksum:
            raise DacoError(
                f"{self.output}: method '{method.name}' is made of another pack than the one whose strength "
                "was chosen (its dictionary, SAEs or the program changed); choose another output folder"
            )
        subject = self.workshop.subject(built)
        cells = [cell for cell in self.cells if cell.method == method.name]
        for cell in cells:
            self._generate(cell, built, subject)
        for cell in cells:
            if cell.benchmark in self.config.divergence:
                self._diverge(cell, built, subject)
        variants = self.variants(method)
        if self.config.timing:
            for variant, strength in variants.items():
                self._time(
                    variant, drawn(variant, method.draws[0]), self._setting(method, strength), built, subject
                )
        # A system prompt stands outside raw text, so its perplexity would be the model's own.
        if self.config.perplexity and built.system is None:
            for variant, strength in variants.items():
                for draw in method.draws:
                    self._perplex(drawn(variant, draw), self._setting(method, strength), built, subject)

    def _generate(self, cell: Cell, built: Built, subject: Subject) -> None:
        rows = RowFile(self._file("answers", cell), self._header(cell))
        if rows.complete:
            return
        samples = [s for s in self.benchmarks[cell.benchmark].samples if s.id not in rows.rows]
        title = f"{cell.name} on {cell.benchmark}" + (f", seed {cell.seed}" if cell.seed else "")
        with progress(title, total=len(samples)) as advance:

            def keep(start: int, answers: list[Answer]) -> None:
                rows.append(
                    {"id": samples[start + i].id, **answer.to_json()} for i, answer in enumerate(answers)
                )
                advance(len(answers))

            subject.answer(
                [ask_for(s, built) for s in samples],
                policy=built.policies[cell.name],
                max_new_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                seeds=[_seed(s, cell.seed) for s in samples],
                on_batch=keep,
            )
        rows.finish()

    def _diverge(self, cell: Cell, built: Built, subject: Subject) -> None:
        from daco_rt.evaluate.metrics import kl_nats

        if cell.seed != self.config.seeds[0]:
            return
        rows = RowFile(self._file("divergence", cell), self._header(cell))
        if rows.complete:
            return
        reference = self.answers(cell.plain)
        samples = [
            s
            for s in self.benchmarks[cell.benchmark].samples
            if s.id not in rows.rows and reference[s.id].token_ids
        ]
        tokens = [reference[s.id].token_ids for s in samples]
        if cell.method == "none":
            rows.append({"id": s.id, "nats": [0.0] * len(t)} for s, t in zip(samples, tokens, strict=True))
            rows.finish()
            return
        size = subject.batch_size
        with progress(f"{cell.name}: divergence on {cell.benchmark}", total=len(samples)) as advance:
            for start in range(0, len(samples), size):
                part, given = samples[start : start + size], tokens[start : start + size]
                plain = subject.logits([ask_for(s, None) for s in part], given, policy="off")
                steered = subject.logits(
                    [ask_for(s, built) for s in part], given, policy=built.policies[cell.name]
                )
                rows.append(
                    {"id": s.id, "nats": np.round(kl_nats(p, q), 9).tolist()}
                    for s, p, q in zip(part, plain, steered, strict=True)
                )
                advance(len(part))
        rows.finish()

    def _perplex(self, name: str, setting: dict[str, Any], built: Built, subject: Subject) -> None:
        from daco_rt.evaluate.perplexity import neutral_passages

        rows = RowFile(self._perplexity_file(name), setting)
        if rows.complete:
            return
        passages = neutral_passages(subject, policy=built.policies[name])
        rows.append(
            {"id": str(i), **row._asdict()} for i, row in enumerate(passages) if str(i) not in rows.rows
        )
        rows.finish()

    def _time(self, variant: str, name: str, setting: dict[str, Any], built: Built, subject: Subject) -> None:
        from daco_rt.evaluate.timing import paired_seconds

        rows = RowFile(self._timing_file(variant), setting)
        policy = built.policies[name]
        # "off" against itself would only say how noisy the machine is.
        if rows.complete or policy == "off":
            return
        pairs = paired_seconds(subject, policy)
        rows.append({"id": str(i), "off": off, "steered": on} for i, (off, on) in enumerate(pairs))
        rows.finish()

    def _timing_file(self, variant: str) -> Path:
        return self.output / "timing" / f"{variant}.jsonl"

    def _perplexity_file(self, name: str) -> Path:
        return self.output / "perplexity" / f"{name}.jsonl"

    def _done(self, method: Method) -> bool:
        for cell in self.cells:
            if cell.method != method.name:
                continue
            wanted = [self._file("answers", cell)]
            if cell.benchmark in self.config.divergence and cell.seed == self.config.seeds[0]:
                wanted.append(self._file("divergence", cell))
            if not all(path.is_file() for path in wanted):
                return False
        timed = self.config.timing and method.kind not in ("none", "system_prompt")
        if timed and not all(self._timing_file(variant).is_file() for variant in self.variants(method)):
            return False
        if not self.config.perplexity or method.kind == "system_prompt":
            return True
        names = [drawn(variant, draw) for variant in self.variants(method) for draw in method.draws]
        return all(self._perplexity_file(name).is_file() for name in names)

    # ---- what lies where

    def _file(self, what: str, cell: Cell, judge: str = "") -> Path:
        return self.output / what / judge / f"{cell.stem}.jsonl"

    def _header(self, cell: Cell) -> dict[str, Any]:
        config, benchmark = self.config, self.benchmarks[cell.benchmark]
        return {
            **self._setting(config.methods[cell.method], cell.strength),
            "benchmark": cell.benchmark,
            "sha256": benchmark.card.sha256,
            "part": [config.part, config.dev, config.split_seed, len(benchmark.samples)],
            "seed": cell.seed,
            **({} if cell.draw is None else {"draw": cell.draw}),
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
        }

    def _setting(self, method: Method, strength: float | None) -> dict[str, Any]:
        dtype = self.config.dtype
        return {
            "model": self.config.checkpoint,
            "engine": self.config.engine if dtype == "float32" else f"{self.config.engine} {dtype}",
            "dictionary": None if self.config.dictionary is None else str(self.config.dictionary),
            "method": method.recipe,
            "strength": strength,
        }

    @property
    def described(self) -> dict[str, Any]:
        """What ``run.json`` says: configuration, cards of the data, versions, machine, commit."""
        return read_record(self.output / "run.json")

    def _describe(self) -> None:
        record = {
            "format": 1,
            **provenance(),
            "config": json.loads(json.dumps(self.config.raw, default=str)),
            "part": self.config.part,
            "benchmarks": {name: b.card.to_json() for name, b in self.benchmarks.items()},
            "samples": {name: len(b.samples) for name, b in self.benchmarks.items()},
        }
        write_json(self.output / "run.json", record)


def _seed(sample: Sample, seed: int) -> int:
    """The seed of one answer: the same whether the run was interrupted before it or not."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{sample.id}".encode()).digest()[:4], "big")


def _is_pending(row: Mapping[str, Any]) -> bool:
    return bool(row.get("pending"))


def _heard(verdict: Verdict, answer: Answer) -> Verdict:
    """A request that could not run has no answer to judge."""
    if not answer.error:
        return verdict
    return Verdict(None, None, answer.error, verdict.source)
