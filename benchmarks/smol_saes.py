"""What SAEs of smol-internvl and pursuit code of a concept at its word, and take out of harmless questions.

    daco-rt build configs/smol-saes.yaml && make smol-saes
    python benchmarks/smol_saes.py builds/smol-saes/labelled builds/smol-saes-held/labelled \\
        builds/smol-saes-held/labelled-random-0

Reads the development questions of evaluate-smol.yaml, unsteered, at one block. For each deadband: the share
of a concept's direction that the codes of undesirable atoms or latents hold where the question says the
concept (mean over the questions that name an undesirable one), in how many of these questions it is above a
half, and from how many harmless questions anything would be taken, and how much of a row (its length, mean
over all tokens). Pursuit with 16 atoms over the shipped dictionary comes first. No times; a minute or two.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, commit, machine, versions
from numpy.typing import NDArray
from observed import codes_of, observing

from daco_rt.artifacts import ConceptDictionary, Sae, load_dictionary, load_sae
from daco_rt.console import print_table
from daco_rt.dictionary import dictionary_for
from daco_rt.evaluate.benchmarks import load_benchmark
from daco_rt.models import resolve_checkpoint
from daco_rt.models.loading import load_torch
from daco_rt.models.residual import read_blocks
from daco_rt.ops import numpy as ops
from daco_rt.runtime.processor import Processor

MODEL, OMP_K = "smol-internvl", 16
OMP_DEADBANDS = (0.3, 0.4, 0.5, 0.6)
SAE_DEADBANDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)

Rows = NDArray[np.float32]
# From rows [n, d] to the codes of undesirable atoms [n, u] and these atoms [u, d].
Code = Callable[[Rows], tuple[Rows, Rows]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("saes", nargs="+", type=Path, help="folders that hold one labelled SAE a block")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS / "smol_saes.json")
    arguments = parser.parse_args()
    dictionary = load_dictionary(dictionary_for(MODEL))
    questions = Questions(dictionary, arguments.block)
    rows = questions.measure("OMP", pursuit(dictionary, arguments.block), OMP_DEADBANDS)
    for folder in arguments.saes:
        sae = load_sae(folder / f"{arguments.block:03d}")
        rows += questions.measure(f"{folder.parent.name}/{folder.name}", latents(sae), SAE_DEADBANDS)
    print_table(list(rows[0]), rows, list(rows[0]))
    report = {
        "benchmark": "smol_saes",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "settings": {"block": arguments.block, "omp_k": OMP_K},
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


class Questions:
    """Rows of the development questions: of each that names an undesirable concept, and of harmless ones."""

    def __init__(self, dictionary: ConceptDictionary, block: int) -> None:
        self.dictionary, self.block = dictionary, block
        checkpoint = resolve_checkpoint("internvl", MODEL)
        model, tokenizer = load_torch(checkpoint.path, "cpu", "bf16")
        processor = Processor(checkpoint.path)
        atoms = _unit(dictionary.atoms(block))
        index = {concept.name: concept.index for concept in dictionary.concepts}

        def read(name: str, **options: Any) -> tuple[list[Rows], list[Any]]:
            samples = load_benchmark(name, **options).part("dev", dev=0.3, seed=0, limit=40).samples
            texts = [processor.render([{"role": "user", "content": sample.prompt}]) for sample in samples]
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            found: dict[int, Rows] = {}
            for i, streams in read_blocks(model, ids, (block,), batch_tokens=2048):
                found[i] = streams[block].float().numpy()[1:]
            return [found[i] for i in range(len(samples))], list(samples)

        self.naming, samples = read("concepts", forms=["named"])
        self.harmless, _ = read("benign")
        self.own = [atoms[index[sample.facts["concept"]]] for sample in samples]

    def measure(self, name: str, code: Code, deadbands: tuple[float, ...]) -> list[dict[str, Any]]:
        """Return one row a deadband."""
        mean, norm = self.dictionary.mean(self.block), self.dictionary.median_norm[self.block]
        naming = [code(rows) for rows in self.naming]
        harmless = [code(rows) for rows in self.harmless]
        found = []
        for deadband in deadbands:
            least = deadband * norm
            shares = []
            for rows, own, (codes, atoms) in zip(self.naming, self.own, naming, strict=True):
                there = (rows - mean) @ own
                at = int(there.argmax())
                taken = np.where(codes[at] > least, codes[at], 0) @ atoms
                shares.append(float(taken @ own / there[at]))
            doses = [
                np.linalg.norm(np.where(codes > least, codes, 0) @ atoms, axis=1)
                / np.linalg.norm(rows, axis=1)
                for rows, (codes, atoms) in zip(self.harmless, harmless, strict=True)
            ]
            found.append(
                {
                    "method": name,
                    "deadband": deadband,
                    "share of own": round(float(np.mean(shares)), 3),
                    "above a half": round(float(np.mean(np.array(shares) > 0.5)), 3),
                    "harmless touched": sum(bool(dose.any()) for dose in doses),
                    "harmless dose": round(float(np.mean([dose.mean() for dose in doses])), 5),
                }
            )
        return found


def pursuit(dictionary: ConceptDictionary, block: int) -> Code:
    """Return matching pursuit over the whole dictionary."""
    atoms = _unit(dictionary.atoms(block)).astype(np.float32)
    bias = (-(atoms @ dictionary.mean(block))).astype(np.float32)
    gram = atoms @ atoms.T
    undesirable = np.array([concept.label == "undesirable" for concept in dictionary.concepts])

    def code(rows: Rows) -> tuple[Rows, Rows]:
        found = ops.steer_pursuit(
            rows, analysis=atoms, bias=bias, atoms=atoms, gram=gram, k=OMP_K, k_out=OMP_K,
            **observing(len(rows), *atoms.shape),
        )  # fmt: skip
        return codes_of(found, len(atoms))[:, undesirable], atoms[undesirable]

    return code


def latents(sae: Sae) -> Code:
    """Return the codes of an SAE's undesirable latents."""
    assert sae.annotation is not None
    chosen = [concept.index for concept in sae.annotation if concept.label == "undesirable"]
    k = sae.k or len(sae.decoder)

    def code(rows: Rows) -> tuple[Rows, Rows]:
        found = ops.steer_sae(
            rows, enc=sae.encoder, enc_bias=sae.enc_bias, dec=sae.decoder, coder=sae.coder, k=k, k_out=k,
            threshold=sae.threshold, **observing(len(rows), *sae.decoder.shape),
        )  # fmt: skip
        return codes_of(found, len(sae.decoder))[:, chosen], sae.decoder[chosen]

    return code


def _unit(rows: NDArray[Any]) -> NDArray[np.float64]:
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
