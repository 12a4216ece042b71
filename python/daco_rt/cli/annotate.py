"""``daco-rt annotate``: label an SAE's latents by a dictionary, count labels, sweep η and γ by a command."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daco_rt.console import add_json, print_json, print_table
from daco_rt.errors import DacoError

if TYPE_CHECKING:
    from daco_rt.artifacts import Concept, ConceptDictionary, Sae
    from daco_rt.sae.sweep import Score

EPILOG = """\
examples:
  daco-rt annotate saes/b16 --dictionary smol-internvl --eta 0.1,0.2,0.3,0.4
  daco-rt annotate saes/b16 --dictionary dictionaries/smol --eta 0.3 --output saes/b16-labelled
  daco-rt annotate saes/b16 --dictionary dictionaries/smol --eta 0.2,0.3 --gamma 0,0.1 \\
      --score './score.py' --results sweep.jsonl --figure sweep.png --output saes/b16-labelled

The first counts how many latents each eta would label. The last compiles a pack for every pair of eta and
gamma and runs the command with the pack's folder as its last argument ("off" for the model without steering).
It must print a JSON object with "safety" and "capability" as its last line, higher is better, measured on a
validation split. The safest pair that keeps the capability is written. A dictionary may be named by its
built-in checkpoint.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("sae", help="an SAE folder, ours or SAELens's")
    parser.add_argument("--dictionary", required=True, metavar="DIR", help="labelled concept dictionary")
    parser.add_argument(
        "--eta",
        required=True,
        type=_numbers,
        metavar="LIST",
        help="smallest cosine for a label, one or several",
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the annotated SAE")
    parser.add_argument(
        "--rule",
        choices=("centroid", "nearest"),
        default="centroid",
        help="compare with the mean of each side (default), or with the most similar concept",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument("--score", metavar="COMMAND", help="prints safety and capability under a pack")
    sweep.add_argument(
        "--gamma", type=_numbers, default=[0.0], metavar="LIST", help="strengths of the desirable shift"
    )
    sweep.add_argument(
        "--gain", type=float, default=0.0, metavar="X",
        help="factor on undesirable codes (default 0, which removes them; -1 turns them around)",
    )  # fmt: skip
    sweep.add_argument(
        "--deadband", type=float, default=0.0, metavar="X",
        help="weaker codes are left alone, as a share of the median norm (default 0)",
    )  # fmt: skip
    sweep.add_argument(
        "--keep-capability", type=float, default=0.95, metavar="X", help="share to keep (default 0.95)"
    )
    sweep.add_argument(
        "--results", metavar="FILE", help="JSON lines; a sweep that was stopped goes on from it"
    )
    sweep.add_argument("--figure", metavar="FILE", help="safety against capability, as png, svg or pdf")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Count, sweep or label."""
    from daco_rt.artifacts import load_dictionary, load_sae
    from daco_rt.dictionary import dictionary_for
    from daco_rt.sae.annotate import annotate_sae, count_labels

    sae = load_sae(arguments.sae)
    dictionary = load_dictionary(dictionary_for(arguments.dictionary) or arguments.dictionary)
    report: dict[str, Any] = {}
    eta = arguments.eta[0] if len(arguments.eta) == 1 else None
    if arguments.score is not None:
        eta, report = _sweep(arguments, sae, dictionary)
    elif arguments.output is None or eta is None:
        if arguments.output is not None:
            raise DacoError(
                "several --eta need --score to choose among them; give one, or leave --output out"
            )
        report["counts"] = count_labels(sae, dictionary, arguments.eta, rule=arguments.rule)
    if arguments.output is not None and eta is not None:
        made = annotate_sae(
            sae, dictionary, arguments.output, eta=eta, rule=arguments.rule, overwrite=arguments.force
        )
        labels = [concept.label for concept in made.annotation]
        report["written"] = {
            "path": str(made.path), "eta": eta, "latents": len(made.decoder),
            "undesirable": labels.count("undesirable"), "desirable": labels.count("desirable"),
        }  # fmt: skip
    if arguments.json:
        print_json(report)
        return 0
    for name in ("counts", "points"):
        if name in report:
            keys = list(report[name][0])
            print_table(keys, report[name], keys)
    if "chosen" in report:
        print(f"chosen: eta {report['chosen']['eta']}, gamma {report['chosen']['gamma']}")
    if "written" in report:
        row = report["written"]
        print(
            f"wrote {row['path']}: {row['undesirable']} undesirable and {row['desirable']} desirable of "
            f"{row['latents']} latents at eta {row['eta']:g}"
        )
    return 0


def _sweep(
    arguments: argparse.Namespace, sae: Sae, dictionary: ConceptDictionary
) -> tuple[float | None, dict[str, Any]]:
    from dataclasses import asdict

    from daco_rt.progress import progress
    from daco_rt.sae.figure import draw_sweep
    from daco_rt.sae.sweep import choose_point, sweep_policies

    total = 1 + len(arguments.eta) * len(arguments.gamma)
    with tempfile.TemporaryDirectory(prefix="daco-sweep-") as folder, progress("sweeping", total) as advance:
        numbers = {"gain": arguments.gain, "deadband": arguments.deadband}
        safety, capability = _scores(arguments.score, sae, dictionary, numbers, Path(folder))
        points = sweep_policies(
            sae, dictionary, etas=arguments.eta, gammas=arguments.gamma, safety=safety, capability=capability,
            rule=arguments.rule, results=arguments.results,
            scored_by={"command": arguments.score, **numbers}, progress=advance,
        )  # fmt: skip
    chosen = choose_point(points, keep_capability=arguments.keep_capability)
    report: dict[str, Any] = {"points": [asdict(point) for point in points], "chosen": asdict(chosen)}
    if arguments.figure:
        figure = draw_sweep(points, arguments.figure, keep_capability=arguments.keep_capability)
        report["figure"] = str(figure)
    if chosen.eta is None and arguments.output is not None:
        raise DacoError(
            "no pair of eta and gamma is safer than the model without steering at the capability to keep; "
            "widen "
            "the grid or lower --keep-capability"
        )
    return chosen.eta, report


def _scores(
    command: str, sae: Sae, dictionary: ConceptDictionary, numbers: dict[str, Any], folder: Path
) -> tuple[Score, Score]:
    """Return two functions that share one run of the command for each point."""
    seen: dict[Any, dict[str, float]] = {}

    def scores(annotation: tuple[Concept, ...], gamma: float) -> dict[str, float]:
        key = (annotation, gamma)
        if key not in seen:
            pack = _pack(sae, dictionary, annotation, gamma, numbers, folder / f"pack-{len(seen)}")
            seen.clear()
            seen[key] = _ask(command, pack)
        return seen[key]

    return (lambda a, g: scores(a, g)["safety"]), (lambda a, g: scores(a, g)["capability"])


def _pack(
    sae: Sae,
    dictionary: ConceptDictionary,
    annotation: tuple[Concept, ...],
    gamma: float,
    numbers: dict[str, Any],
    path: Path,
) -> str:
    from daco_rt.steering import PolicySpec, compile_sae_pack

    labels = {concept.label for concept in annotation}
    if "undesirable" not in labels and not (gamma and "desirable" in labels):
        return "off"
    compile_sae_pack(
        {sae.block: sae},
        path,
        median_norm={sae.block: dictionary.median_norm[sae.block]},
        policies=[PolicySpec("default", gamma=gamma if "desirable" in labels else 0.0, **numbers)],
        concepts=annotation,
        model=dictionary.model,
        overwrite=True,
    )
    return str(path)


def _ask(command: str, pack: str) -> dict[str, float]:
    words = [*shlex.split(command), pack]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise DacoError(
            f"--score: '{command}' cannot be run ({error.strerror}); give a command that can, such as "
            "'python score.py'"
        ) from error
    lines = done.stdout.strip().splitlines()
    try:
        if done.returncode:
            raise ValueError(f"exit status {done.returncode}")
        found = json.loads(lines[-1])
        return {name: float(found[name]) for name in ("safety", "capability")}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DacoError(
            f"--score: '{shlex.join(words)}' must end with a line like "
            '{"safety": 0.9, "capability": 0.5}, '
            f"got {lines[-1][:120] if lines else 'nothing'!r} ({error})"
        ) from error


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None
