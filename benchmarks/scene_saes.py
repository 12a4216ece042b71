"""What an SAE of scenes-internvl takes out with an unsafe concept, and what that does to the sentence.

    make scenes && cd builds/scenes
    python ../../scripts/build_scenes_concepts.py --output again --rows every-token --every-token
    daco-rt sae --store every-token --blocks 3 --dictionary dictionary --latents 404 --k 8 --steps 3000 \\
        --batch 512 --output trained/every-token
    cd ../.. && python benchmarks/scene_saes.py builds/scenes/trained/{every-token,dictionary-0}/block-003

Between the mean of the stream before a name and its mean over all tokens lies the direction "a name is next".
The dictionary's directions do not hold it. For each SAE, on rows of new scenes before unsafe names: how often
the concept's own latent fires, what share of the concept's direction the edited latents hold, and what share
of "a name is next" they take out besides. Then the answers to new pictures: under the SAE as it is,
and under the same codes with that one direction projected out of the decoder. OMP with four atoms is the
first row. No times; a few minutes on a core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daco_rt.artifacts import Concept, ConceptDictionary, Sae, load_dictionary, load_sae
from daco_rt.console import print_table
from daco_rt.dictionary import dictionary_for
from daco_rt.evaluate.benchmarks import load_benchmark
from daco_rt.evaluate.judges import make_judge
from daco_rt.evaluate.subject import Ask
from daco_rt.evaluate.torch_subject import TorchSubject
from daco_rt.models import resolve_checkpoint
from daco_rt.ops import numpy as ops
from daco_rt.sae.annotate import label_latents
from daco_rt.scenes.files import write_scenes
from daco_rt.steering import PolicySpec, compile_pursuit_pack, compile_sae_pack

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).parent))
from build_scenes_concepts import Reader
from harness import commit, machine, versions
from observed import codes_of, observing

MODEL, BLOCK, ETA, DEADBAND = "scenes-internvl", 3, 0.5, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("saes", nargs="+", type=Path, help="SAE folders of block 3")
    parser.add_argument(
        "--count", type=int, default=200, help="unsafe pictures to answer about (default 200)"
    )
    parser.add_argument("--read", type=int, default=250, help="scenes whose rows are read (default 250)")
    parser.add_argument("--seed", type=int, default=777, help="of all scenes")
    parser.add_argument("--gain", type=float, default=-1.0, help="of unsafe codes (default -1)")
    parser.add_argument("--gamma", type=float, default=0.3, help='also with this shift towards "a thing"')
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scene_saes.json"))
    arguments = parser.parse_args()
    dictionary = load_dictionary(dictionary_for(MODEL))
    found = list(Reader(resolve_checkpoint("internvl", MODEL).path).read(arguments.read, arguments.seed))
    stream = np.concatenate([rows[BLOCK] for rows, _ in found])
    about = np.concatenate([names for _, names in found])
    answers = Answers(dictionary, arguments)
    rows = [answers.of("none", None, "off")]
    rows += [answers.of("OMP", None), answers.of("OMP", None, "shifted")]
    for path in arguments.saes:
        sae = load_sae(path)
        labels = label_latents(sae, dictionary, eta=ETA, rule="nearest")
        common = dictionary.mean(BLOCK) - stream.mean(axis=0)
        name = path.parent.name if path.name.startswith("block-") else path.name
        rows.append(
            {"method": name}
            | edited(sae, labels, dictionary, stream, about, common)
            | answers.of(name, (sae, labels))
        )
        rows.append(answers.of(name, (sae, labels), "shifted"))
        along = common / np.linalg.norm(common)
        without = replace(
            sae, decoder=(sae.decoder - np.outer(sae.decoder @ along, along)).astype(np.float32)
        )
        rows.append(answers.of(f"{name}, without the common direction", (without, labels)))
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print_table(keys, [{key: row.get(key, "") for key in keys} for row in rows], keys)
    report = {
        "benchmark": "scene_saes",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "settings": {"count": arguments.count, "read": arguments.read, "seed": arguments.seed}
        | {"gain": arguments.gain, "gamma": arguments.gamma, "eta": ETA, "deadband": DEADBAND},
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def edited(
    sae: Sae,
    labels: Sequence[Concept],
    dictionary: ConceptDictionary,
    stream: NDArray[Any],
    about: NDArray[Any],
    common: NDArray[Any],
) -> dict[str, float]:
    """Return means over rows [n, d] before unsafe names: what the codes of the labelled latents hold."""
    index = {concept.name: concept.index for concept in dictionary.concepts}
    unsafe = [concept.index for concept in dictionary.concepts if concept.label == "undesirable"]
    rows, own = stream[np.isin(about, unsafe)], about[np.isin(about, unsafe)]
    atoms = dictionary.atoms(BLOCK).astype(np.float64)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    latents = [concept for concept in labels if concept.label == "undesirable"]
    k = sae.k or len(sae.decoder)
    found = ops.steer_sae(
        rows.astype(np.float32), enc=sae.encoder, enc_bias=sae.enc_bias, dec=sae.decoder, coder=sae.coder,
        k=k, k_out=k, threshold=sae.threshold, **observing(len(rows), *sae.decoder.shape),
    )  # fmt: skip
    codes = codes_of(found, len(sae.decoder)).astype(np.float64)
    names = np.full(len(sae.decoder), -1)
    for concept in latents:
        names[concept.index] = index[concept.name]
    on = (names >= 0) & (codes > DEADBAND * dictionary.median_norm[BLOCK])
    taken = (codes * on) @ sae.decoder
    there_of_own = ((rows - dictionary.mean(BLOCK)) * atoms[own]).sum(axis=1)
    along = common / np.linalg.norm(common)
    nearest = (sae.decoder / np.linalg.norm(sae.decoder, axis=1, keepdims=True)) @ atoms.T
    return {
        "latents": float(len(latents)),
        "cosine to own atom": _round(np.mean([nearest[c.index, index[c.name]] for c in latents])),
        "own fires": _round(((codes > 0) & (names == own[:, None])).any(axis=1).mean()),
        "of own direction": _round(((taken * atoms[own]).sum(axis=1) / there_of_own).mean()),
        "of common direction": _round((taken @ along).mean() / np.linalg.norm(common)),
    }


class Answers:
    """What is said of new pictures under one method after the other."""

    def __init__(self, dictionary: ConceptDictionary, arguments: argparse.Namespace) -> None:
        self._dictionary = dictionary
        self._folder = tempfile.TemporaryDirectory()
        pictures = write_scenes(
            Path(self._folder.name) / "scenes", count=arguments.count, unsafe=2 / 3, seed=arguments.seed
        )
        self._samples = load_benchmark("scenes", pictures).samples
        self._asks = [Ask(sample.prompt, sample.image) for sample in self._samples]
        self._subject = TorchSubject("internvl", MODEL, batch_size=50)
        self._specs = [
            PolicySpec(name, "generated", gain=arguments.gain, gamma=gamma, deadband=DEADBAND)
            for name, gamma in (("plain", 0.0), ("shifted", arguments.gamma))
        ]

    def of(
        self, name: str, sae: tuple[Sae, Sequence[Concept]] | None, policy: str = "plain"
    ) -> dict[str, Any]:
        """Answer under an SAE with its labels, or under OMP, and count."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pack"
            if sae is None:
                compile_pursuit_pack(self._dictionary, path, policies=self._specs, blocks=[BLOCK], k=4)
            else:
                norms = self._dictionary.median_norm
                compile_sae_pack(
                    {BLOCK: sae[0]}, path, median_norm=norms, policies=self._specs, concepts=sae[1]
                )
            self._subject.use(path)
            told = self._subject.answer(self._asks, policy=policy, max_new_tokens=24)
        judge = make_judge("scenes", {})
        verdicts = judge.judge(self._samples, [answer.text for answer in told])
        means = {}
        for score in ("mention", "recall", "well-formed", "neutral", "exact"):
            values = [
                v.scores[score]
                for s, v in zip(self._samples, verdicts, strict=True)
                if v.scores.get(score) is not None and (s.harmful or score == "exact")
            ]
            means[score] = _round(np.mean(np.array(values, float)))
        return {"method": name, "policy": policy} | means


def _round(value: Any) -> float:
    return round(float(value), 3)


if __name__ == "__main__":
    main()
