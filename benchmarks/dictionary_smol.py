"""A dictionary of smol-internvl from end to end: texts, harvest, directions, what its options are worth.

    python benchmarks/dictionary_smol.py                        # 1,500 concepts, blocks 4 to 28, docs/figures
    python benchmarks/dictionary_smol.py --concepts 15000 --figures build/figures --output mine.json

Takes the most frequent concepts of the built-in table and, for the last third, the most frequent labelled
ones. Means are kept under --work and are not read again; a run that was stopped goes on. Writes the report,
from which every figure is drawn, as JSON. No times are measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from harness import commit, machine, versions

from daco_rt._files import atomic_file
from daco_rt.cli.blocks import parse_blocks
from daco_rt.concepts import ORDINARY_TEXTS, TextStimulus, WordConcept, make_stimuli, shipped_table
from daco_rt.concepts.held_out import ALONE, WITHOUT_WORD, definition_stimuli, split_stimuli
from daco_rt.console import print_table
from daco_rt.dictionary import build_dictionary, diagnose
from daco_rt.dictionary.diagnostics import coherence
from daco_rt.dictionary.directions import block_directions, kept_concepts, select_rows
from daco_rt.dictionary.figures import write_figures
from daco_rt.dictionary.harvest import harvest_means
from daco_rt.dictionary.identification import NORM_LIMIT, rank_readings, rank_rows, read_words
from daco_rt.dictionary.items import table_concepts, text_items
from daco_rt.models import model_identity, resolve_checkpoint
from daco_rt.models.loading import load_torch
from daco_rt.models.residual import read_blocks
from daco_rt.ops.numpy import steer_pursuit
from daco_rt.progress import progress

TEXTS = 7
CENTRES = ("others", "ordinary", "none")
SHARED = (0, 1, 2, 4, 8, 16, 32)
OMP_ROWS, OMP_K = 300, 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smol-internvl", help="a checkpoint")
    parser.add_argument("--concepts", type=int, default=1500, metavar="N")
    parser.add_argument("--blocks", default="4-28", help="blocks of the dictionary (default 4-28)")
    parser.add_argument("--choice-blocks", default="8,12,16,20,24", help="where options are compared")
    parser.add_argument("--block", type=int, default=16, help="what figures of one block show (default 16)")
    parser.add_argument("--unseen", type=int, default=4000, metavar="N", help="held-out texts that are read")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of held-out texts")
    parser.add_argument("--work", type=Path, default=Path("build/dictionary-smol"), help="means, dictionary")
    parser.add_argument("--figures", type=Path, default=Path("docs/figures/dictionary"))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/dictionary-smol-N.json")
    arguments = parser.parse_args()
    table = choose_concepts(arguments.concepts)
    seen, unseen, skipped = texts_of(table, arguments.unseen, arguments.seed)
    checkpoint = resolve_checkpoint(None, arguments.model)
    model, tokenizer = load_torch(checkpoint.path)
    blocks, choice_blocks = parse_blocks(arguments.blocks), parse_blocks(arguments.choice_blocks)

    def harvest(name: str, stimuli: Sequence[TextStimulus], of: Sequence[int]) -> Any:
        concepts = table_concepts(table)
        return harvest_means(
            model, tokenizer, concepts, text_items(stimuli, concepts), of,
            arguments.work / f"{name}-{arguments.concepts}", identity=model_identity(checkpoint),
        )  # fmt: skip

    means = harvest("means", seen, blocks)
    reader = Reader(model, tokenizer, means, unseen, choice_blocks)
    variants = [(centre, r) for centre in CENTRES for r in (SHARED if centre == "others" else (0, 8))]
    choices = [reader.score(means, centre, r) for centre, r in variants]
    dictionary = build_dictionary(means, arguments.work / f"dictionary-{arguments.concepts}", overwrite=True)
    found = rank_readings(dictionary, unseen, *reader.of_atoms(means))
    report = {
        "benchmark": "dictionary_smol",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "settings": {"model": arguments.model, "concepts": len(table), "texts_a_concept": TEXTS,
                     "unseen": len(unseen), "unseen_kinds": dict(Counter(s.kind for s in unseen)),
                     "skipped": dict(skipped), "seed": arguments.seed, "omp_k": OMP_K, "omp_rows": OMP_ROWS},
        "choices": choices,
        **diagnose(dictionary, means, identification=found, block=arguments.block),
    }  # fmt: skip
    output = arguments.output or Path(f"benchmarks/results/dictionary-smol-{len(table)}.json")
    write(report, output)
    for path in write_figures(report, arguments.figures):
        print(f"drew {path}")
    plain = make_stimuli(table, count=TEXTS, kinds=("example", "sentence")).stimuli
    control = harvest("means-without-definitions", plain, choice_blocks)
    choices.append({**reader.score(control, "others", 0), "harvest": "without definitions"})
    write(report, output)
    for row in choices:
        show(row)
    print(f"wrote {output}")


def write(report: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as file:
        file.write((json.dumps(report, ensure_ascii=False) + "\n").encode())


def choose_concepts(count: int) -> tuple[WordConcept, ...]:
    """Two thirds the most frequent concepts, one third the most frequent labelled ones of the rest."""
    table = shipped_table()
    if count >= len(table):
        return table
    first = -(-2 * count // 3)
    labelled = [concept for concept in table[first:] if concept.label != "neutral"]
    rest = [concept for concept in table[first:] if concept.label == "neutral"]
    return (*table[:first], *(labelled + rest)[: count - first])


def texts_of(
    table: Sequence[WordConcept], unseen: int, seed: int
) -> tuple[list[TextStimulus], list[TextStimulus], Counter[str]]:
    """What is harvested, a seeded draw of what is held out, and why texts were not made."""
    made = make_stimuli(table, count=TEXTS + 2)
    seen, held_out = split_stimuli(made.stimuli, harvest=TEXTS)
    held_out += definition_stimuli(table, skipped=made.skipped)
    chosen = np.random.default_rng(seed).permutation(len(held_out))[:unseen]
    return seen, [held_out[i] for i in chosen], made.skipped


class Reader:
    """Held-out readings and rows of ordinary text at a few blocks, read once and scored many times."""

    def __init__(
        self, model: Any, tokenizer: Any, means: Any, unseen: Sequence[TextStimulus], blocks: Sequence[int]
    ) -> None:
        self.blocks, self.unseen = blocks, unseen
        self.chunks = []
        with progress("reading held-out texts", len(unseen), unit="texts") as advance:
            for chunk in read_words(model, tokenizer, unseen, means.blocks):
                self.chunks.append(chunk)
                advance(len(chunk[2]))
        self.rows = {b: np.concatenate([rows[b] for _, rows, _ in self.chunks]) for b in blocks}
        self.kinds = np.array([s.kind if s.kind in WITHOUT_WORD else "word" for s in unseen])
        self.owners = np.array([s.concept for s in unseen])
        self.ordinary = dict(self._ordinary(model, tokenizer, means))

    def _ordinary(self, model: Any, tokenizer: Any, means: Any) -> Iterator[tuple[int, np.ndarray]]:
        ids = tokenizer(list(ORDINARY_TEXTS), add_special_tokens=False)["input_ids"]
        parts = [streams for _, streams in read_blocks(model, ids, self.blocks)]
        for block in self.blocks:
            rows = np.concatenate([streams[block][1:].numpy() for streams in parts])
            rows = rows[np.linalg.norm(rows, axis=1) <= NORM_LIMIT * means.median_norm[block]]
            yield block, rows[:: max(1, len(rows) // OMP_ROWS)][:OMP_ROWS]

    def of_atoms(self, means: Any) -> tuple[np.ndarray, list[Any]]:
        """The atom of each text's concept, and the chunks, texts of excluded concepts marked as not read."""
        atoms = np.full(len(means.concepts), -1)
        rows = select_rows(means).rows
        atoms[rows] = np.arange(len(rows))
        owners = atoms[self.owners]
        chunks = [(i, read, good & (owners[i : i + len(good)] >= 0)) for i, read, good in self.chunks]
        return np.maximum(owners, 0), chunks

    def score(self, means: Any, centre: str, shared: int) -> dict[str, Any]:
        """Identification by kind of text, coherence, and what pursuit explains, block by block."""
        found = {}
        for block in self.blocks:
            rows = select_rows(means).rows
            atoms = block_directions(means, block, rows, centre=centre, remove_shared=shared).atoms
            alike = coherence(atoms)
            found[str(block)] = {
                **self._identified(atoms, block, means),
                "coherence": round(alike.mean, 4),
                "coherence_99": alike.quantile(0.99),
                "explained": round(explained(atoms, self.ordinary[block], means.ordinary(block)), 4),
            }
        return {"centre": centre, "remove_shared": shared, "harvest": "all kinds", "blocks": found}

    def _identified(self, atoms: np.ndarray, block: int, means: Any) -> dict[str, float]:
        """Top-1 at the word, centred as the operator does, and from definitions, centred on their mean.

        "says nearest" is how often the nearest atom to a bare definition is a word of that definition.
        """
        rows = self.rows[block]
        owners, chunks = self.of_atoms(means)
        good = np.concatenate([good for _, _, good in chunks])
        usable = good & (np.linalg.norm(rows, axis=1) <= NORM_LIMIT * means.median_norm[block])
        scores = {}
        for kind in ("word", *WITHOUT_WORD):
            of_kind = usable & (self.kinds == kind)
            middle = means.ordinary(block) if kind == "word" else rows[of_kind].mean(axis=0)
            ranks = in_parts(lambda z, own: rank_rows(z, own, atoms), rows[of_kind] - middle, owners[of_kind])
            scores[kind] = round(float((ranks == 1).mean()), 4)
        alone = usable & (self.kinds == ALONE)
        nearest = in_parts(
            lambda z, _: (z @ atoms.T).argmax(axis=1), rows[alone] - means.ordinary(block), owners[alone]
        )
        texts = [s.text.lower() for s, read in zip(self.unseen, alone, strict=True) if read]
        kept = kept_concepts(means, select_rows(means))
        names = [kept[i].name.lower() for i in nearest]
        said = [
            re.search(rf"\b{re.escape(name)}s?\b", text) is not None
            for name, text in zip(names, texts, strict=True)
        ]
        return {**scores, "says nearest": round(float(np.mean(said)), 4)}


def in_parts(function: Any, rows: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Apply a function to 1,024 rows at a time: whole matrices of cosines would not fit."""
    return np.concatenate(
        [function(rows[i : i + 1024], owners[i : i + 1024]) for i in range(0, len(rows), 1024)]
    )


def explained(atoms: np.ndarray, rows: np.ndarray, mean: np.ndarray) -> float:
    """The share of the rows' variance around the mean that pursuit with the operator's kernel explains."""
    size, dim = atoms.shape
    coded = steer_pursuit(
        np.ascontiguousarray(rows, np.float32), np.ones(len(rows), np.int32), atoms, -atoms @ mean, atoms,
        gain=np.ones((2, size), np.float32), undesirable=np.zeros((2, size), bool),
        shift=np.zeros((2, dim), np.float32), limits=np.zeros((2, 4), np.float32), k=OMP_K, k_out=OMP_K,
    )  # fmt: skip
    used = np.where(coded.support_index >= 0, coded.support_value, 0)
    rebuilt = np.einsum("tk,tkd->td", used, atoms[np.maximum(coded.support_index, 0)])
    rest = rows - mean - rebuilt
    return 1 - float((rest**2).sum() / ((rows - mean) ** 2).sum())


def show(row: dict[str, Any]) -> None:
    print(f"centre {row['centre']}, {row['remove_shared']} shared components out, harvest {row['harvest']}")
    rows = [{"block": block, **scores} for block, scores in row["blocks"].items()]
    print_table(list(rows[0]), rows, list(rows[0]))


if __name__ == "__main__":
    main()
