"""Running an evaluation: methods × benchmarks × seeds, one file of answers a cell, and every judge over each.

A run that was stopped goes on where it was; a repeated one does nothing. Answers, verdicts and divergences
are kept apart, so that a judge can be added without generating anything again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt._files import atomic_file
from daco_rt.artifacts import ConceptDictionary, load_dictionary
from daco_rt.dictionary import dictionary_for
from daco_rt.errors import DacoError
from daco_rt.evaluate.benchmarks import load_benchmark
from daco_rt.evaluate.config import EvaluationConfig
from daco_rt.evaluate.judges import Verdict, make_judge
from daco_rt.evaluate.methods import Built, Codes, Method, build_method
from daco_rt.evaluate.provenance import provenance
from daco_rt.evaluate.rows import RowFile, read_rows
from daco_rt.evaluate.samples import Benchmark, Sample
from daco_rt.evaluate.subject import Answer, Ask, BundleSubject, Subject
from daco_rt.progress import progress

OBSERVED_PROMPTS = 32
"""Questions of the development part on which the random-atom control is matched."""


@dataclass(frozen=True)
class Cell:
    """One file of answers."""

    variant: str
    method: str
    strength: float | None
    benchmark: str
    seed: int

    @property
    def stem(self) -> str:
        """Where its rows lie, below ``answers`` and ``verdicts/{judge}``."""
        return f"{self.benchmark}/{self.variant}-s{self.seed}"


class Evaluation:
    """An evaluation on disk.

    Parameters
    ----------
    config : what to run.

    Example
    -------
    >>> Evaluation(read_config("configs/evaluate-pocket.yaml")).run()               # doctest: +SKIP
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        self.output = config.output
        self._loaded: Subject | None = None
        self.benchmarks: dict[str, Benchmark] = {}
        self._whole: dict[str, Benchmark] = {}
        for name, data in config.benchmarks.items():
            whole = load_benchmark(data.kind, data.path, **data.options)
            self._whole[name] = whole
            self.benchmarks[name] = whole.part(
                config.part, dev=config.dev, seed=config.split_seed, limit=data.limit
            )

    @property
    def cells(self) -> list[Cell]:
        """Every cell, the unsteered model's first."""
        return [
            Cell(variant, method.name, strength, benchmark, seed)
            for method in self.config.methods.values()
            for variant, strength in method.labels.items()
            for benchmark in self.benchmarks
            for seed in self.config.seeds
        ]

    def run(self) -> None:
        """Generate, measure and judge whatever is missing.

        Raises
        ------
        DacoError
            A source is missing or does not fit, or the folder holds an evaluation under other settings.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        self._describe()
        for method in self.config.methods.values():
            if not self._done(method):
                self._run_method(method)
        self.judge()

    def judge(self) -> None:
        """Let every judge speak about every answer that it has not seen."""
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
                    samples = [s for s in self.benchmarks[cell.benchmark].samples if s.id not in rows.rows]
                    answers = self.answers(cell)
                    verdicts = judge.judge(samples, [answers[s.id].text for s in samples])
                    rows.append(
                        {"id": s.id, **_heard(v, answers[s.id]).to_json()}
                        for s, v in zip(samples, verdicts, strict=True)
                    )
                    rows.finish()
                    advance(1)

    def judged(self, cell: Cell) -> bool:
        """Whether a cell has all its answers, and every judge's verdicts."""
        paths = [self._file("verdicts", cell, name) for name in self.config.judges]
        return all(path.is_file() for path in [self._file("answers", cell), *paths])

    def answers(self, cell: Cell) -> dict[str, Answer]:
        """Return a cell's answers by the sample's id."""
        rows = RowFile(self._file("answers", cell), self._header(cell)).rows
        return {key: Answer(**{k: v for k, v in row.items() if k != "id"}) for key, row in rows.items()}

    def verdicts(self, cell: Cell, judge: str) -> dict[str, Verdict]:
        """Return a judge's verdicts about a cell by the sample's id."""
        rows = read_rows(self._file("verdicts", cell, judge))
        return {row.pop("id"): Verdict.from_json(row) for row in rows}

    def divergences(self, cell: Cell) -> dict[str, list[float]] | None:
        """Return KL(unsteered ‖ steered) in nats by token of each unsteered answer; None if not asked."""
        path = self._file("divergence", cell)
        if cell.benchmark not in self.config.divergence or not path.is_file():
            return None
        return {row["id"]: row["nats"] for row in read_rows(path)}

    def neutral_nats(self, variant: str) -> list[list[float]] | None:
        """Return −ln p by token of each neutral passage under a variant; None if it was not measured."""
        path = self._perplexity_file(variant)
        if not path.is_file():
            return None
        return [row["nats"] for row in read_rows(path)]

    def seconds(self, variant: str) -> list[tuple[float, float]] | None:
        """Return pairs of seconds a token, unsteered and under a variant; None if they were not measured."""
        path = self._timing_file(variant)
        if not path.is_file():
            return None
        return [(row["off"], row["steered"]) for row in read_rows(path)]

    # ---- one method

    def _run_method(self, method: Method) -> None:
        built = build_method(method, self._dictionary(method), self.output / "packs", observe=self._observe)
        subject = self._subject(built)
        self._note(built)
        for cell in self.cells:
            if cell.method == method.name:
                self._generate(cell, built, subject)
        for cell in self.cells:
            if cell.method == method.name and cell.benchmark in self.config.divergence:
                self._diverge(cell, built, subject)
        if self.config.timing:
            for variant in method.labels:
                self._time(variant, method, built, subject)
        # A system prompt stands outside raw text, so its perplexity would be the model's own.
        if self.config.perplexity and built.system is None:
            for variant in method.labels:
                self._perplex(variant, method, built, subject)

    def _generate(self, cell: Cell, built: Built, subject: Subject) -> None:
        rows = RowFile(self._file("answers", cell), self._header(cell))
        if rows.complete:
            return
        samples = [s for s in self.benchmarks[cell.benchmark].samples if s.id not in rows.rows]
        title = f"{cell.variant} on {cell.benchmark}" + (f", seed {cell.seed}" if cell.seed else "")
        with progress(title, total=len(samples)) as advance:

            def keep(start: int, answers: list[Answer]) -> None:
                rows.append(
                    {"id": samples[start + i].id, **answer.to_json()} for i, answer in enumerate(answers)
                )
                advance(len(answers))

            subject.answer(
                [_ask(s, built) for s in samples],
                policy=built.policies[cell.variant],
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
        reference = self.answers(Cell("none", "none", None, cell.benchmark, cell.seed))
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
        with progress(f"{cell.variant}: divergence on {cell.benchmark}", total=len(samples)) as advance:
            for start in range(0, len(samples), size):
                part, given = samples[start : start + size], tokens[start : start + size]
                plain = subject.logits([_ask(s, None) for s in part], given, policy="off")
                steered = subject.logits(
                    [_ask(s, built) for s in part], given, policy=built.policies[cell.variant]
                )
                rows.append(
                    {"id": s.id, "nats": np.round(kl_nats(p, q), 9).tolist()}
                    for s, p, q in zip(part, plain, steered, strict=True)
                )
                advance(len(part))
        rows.finish()

    def _perplex(self, variant: str, method: Method, built: Built, subject: Subject) -> None:
        from daco_rt.evaluate.perplexity import neutral_nats

        rows = RowFile(self._perplexity_file(variant), self._setting(method, method.labels[variant]))
        if rows.complete:
            return
        nats = neutral_nats(subject, policy=built.policies[variant])
        rows.append(
            {"id": str(i), "nats": values} for i, values in enumerate(nats) if str(i) not in rows.rows
        )
        rows.finish()

    def _time(self, variant: str, method: Method, built: Built, subject: Subject) -> None:
        from daco_rt.evaluate.timing import paired_seconds

        rows = RowFile(self._timing_file(variant), self._setting(method, method.labels[variant]))
        policy = built.policies[variant]
        # "off" against itself would only say how noisy the machine is.
        if rows.complete or policy == "off":
            return
        pairs = paired_seconds(subject, policy)
        rows.append({"id": str(i), "off": off, "steered": on} for i, (off, on) in enumerate(pairs))
        rows.finish()

    def _timing_file(self, variant: str) -> Path:
        return self.output / "timing" / f"{variant}.jsonl"

    def _perplexity_file(self, variant: str) -> Path:
        return self.output / "perplexity" / f"{variant}.jsonl"

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
        if timed and not all(self._timing_file(variant).is_file() for variant in method.labels):
            return False
        if not self.config.perplexity or method.kind == "system_prompt":
            return True
        return all(self._perplexity_file(variant).is_file() for variant in method.labels)

    def _subject(self, built: Built) -> Subject:
        config = self.config
        if config.engine == "torch" and built.bundle is None:
            return self._torch(built)
        if built.bundle is not None:
            return BundleSubject(built.bundle, threads=config.threads, batch_size=config.batch_size)
        from daco_rt.export import export_model

        # Methods without a pack still run in a bundle: that of the model alone, made once.
        if built.pack is None and self._loaded is not None:
            return self._loaded
        folder = self.output / "bundles" / ("plain" if built.pack is None else built.method.name)
        export_model(
            config.family, checkpoint=config.checkpoint, pack=built.pack, output=folder, overwrite=True
        )
        subject = BundleSubject(folder, threads=config.threads, batch_size=config.batch_size)
        if built.pack is None:
            self._loaded = subject
        return subject

    def _torch(self, built: Built) -> Subject:
        from daco_rt.evaluate.torch_subject import TorchSubject

        # One model for all methods: loading it again costs more than most cells.
        if not isinstance(self._loaded, TorchSubject):
            self._loaded = TorchSubject(
                self.config.family,
                self.config.checkpoint,
                batch_size=self.config.batch_size,
                device=self.config.device,
                dtype=self.config.dtype,
            )
        self._loaded.use(built.pack)
        return self._loaded

    def _observe(self, pack: Path) -> Codes:
        """All codes of the development questions of the first harmful benchmark, under "observe"."""
        config = self.config
        name = next((n for n, b in self._whole.items() if b.samples[0].harmful), next(iter(self._whole)))
        dev = self._whole[name].part(
            "dev", dev=config.dev or 0.3, seed=config.split_seed, limit=OBSERVED_PROMPTS
        )
        built = Built(Method("observed", "none"), {}, pack=pack)
        subject = self._subject(built)
        return subject.observe([_ask(s, None) for s in dev.samples], max_new_tokens=config.max_new_tokens)

    def _dictionary(self, method: Method) -> ConceptDictionary | None:
        source = self.config.dictionary
        if source == "built-in":
            source = dictionary_for(self.config.checkpoint)
            if source is None:
                raise DacoError(
                    f"{self.config.path}: checkpoint {self.config.checkpoint} has no built-in dictionary; "
                    "name a folder by dictionary:"
                )
        return None if source is None else load_dictionary(source)

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
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
        }

    def _setting(self, method: Method, strength: float | None) -> dict[str, Any]:
        dtype = self.config.dtype
        return {
            "model": self.config.checkpoint,
            "engine": self.config.engine if dtype == "float32" else f"{self.config.engine} {dtype}",
            "dictionary": None if self.config.dictionary is None else str(self.config.dictionary),
            "method": [method.kind, dict(sorted(method.options.items()))],
            "strength": strength,
        }

    def _describe(self) -> None:
        record = {
            "format": 1,
            **provenance(),
            "config": json.loads(json.dumps(self.config.raw, default=str)),
            "part": self.config.part,
            "benchmarks": {name: b.card.to_json() for name, b in self.benchmarks.items()},
            "samples": {name: len(b.samples) for name, b in self.benchmarks.items()},
        }
        with atomic_file(self.output / "run.json") as file:
            file.write((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())

    def _note(self, built: Built) -> None:
        if built.notes:
            with atomic_file(self.output / "packs" / f"{built.method.name}.notes.json") as file:
                file.write((json.dumps(built.notes, indent=2) + "\n").encode())


def _ask(sample: Sample, built: Built | None) -> Ask:
    return Ask(sample.prompt, sample.image, None if built is None else built.system)


def _seed(sample: Sample, seed: int) -> int:
    """The seed of one answer: the same whether the run was interrupted before it or not."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{sample.id}".encode()).digest()[:4], "big")


def _heard(verdict: Verdict, answer: Answer) -> Verdict:
    """A request that could not run has no answer to judge."""
    if not answer.error:
        return verdict
    return Verdict(None, None, answer.error, verdict.source)
