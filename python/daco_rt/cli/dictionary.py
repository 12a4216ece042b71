"""``daco-rt dictionary``: directions from concept means, and a look at them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daco_rt.console import add_json, print_json, print_table
from daco_rt.errors import DacoError

if TYPE_CHECKING:
    from daco_rt.artifacts import ConceptDictionary
    from daco_rt.dictionary.identification import Identification
    from daco_rt.dictionary.means import ConceptMeans

EPILOG = """\
examples:
  daco-rt dictionary means/smol --output dictionaries/smol
  daco-rt dictionary means/smol --output dictionaries/smol --figures figures
  daco-rt dictionary means/smol --output dictionaries/smol --held-out unseen.jsonl.gz --model internvl --json

MEANS is what daco-rt harvest wrote. The atom of a concept is its mean minus the centre, at unit norm.
--held-out reads texts that were not harvested (daco-rt stimuli --held-out) and says at each block how often
the nearest atom is the right concept. --figures also writes diagnostics.json, which all are drawn from.
"""
CENTRED = {"ordinary": "ordinary text, as the operator does", "readings": "readings of their own kind"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("means", metavar="MEANS", help="folder of concept means")
    parser.add_argument("--output", required=True, metavar="DIR", help="dictionary to write")
    parser.add_argument("--force", action="store_true", help="replace an existing dictionary")
    parser.add_argument(
        "--centre",
        choices=("others", "negatives", "ordinary", "none"),
        help="what is subtracted from each mean (default: others for readings at words, else negatives)",
    )
    parser.add_argument(
        "--remove-shared", type=int, default=0, metavar="R", help="leading components to take out (default 0)"
    )
    parser.add_argument(
        "--minimum", type=int, default=4, metavar="K", help="fewest readings of a concept (default 4)"
    )
    looking = parser.add_argument_group("diagnostics")
    looking.add_argument(
        "--figures", type=Path, metavar="DIR", help="folder for figures and diagnostics.json"
    )
    looking.add_argument(
        "--format", choices=("png", "svg", "pdf"), default="png", help="of figures (default png)"
    )
    looking.add_argument("--block", type=int, metavar="L", help="block that figures of one block show")
    looking.add_argument("--held-out", metavar="TEXTS", help="stimuli that were not harvested")
    looking.add_argument(
        "--model", metavar="FAMILY", help="model family that reads them, by its built-in checkpoint"
    )
    looking.add_argument("--checkpoint", metavar="DIR|NAME", help="the checkpoint that reads them")
    looking.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto (default auto)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the dictionary, then measure what was asked for."""
    from daco_rt.dictionary.directions import build_dictionary
    from daco_rt.dictionary.means import open_means

    means = open_means(arguments.means, verify=True)
    # Whatever can be refused is refused before anything is written.
    reader = _reader(arguments, means)
    _check_figures(arguments, means)
    dictionary = build_dictionary(
        means,
        arguments.output,
        centre=arguments.centre,
        remove_shared=arguments.remove_shared,
        minimum=arguments.minimum,
        overwrite=arguments.force,
    )
    identification = None if reader is None else reader(dictionary)
    report = None
    figures: tuple[Path, ...] = ()
    if arguments.figures:
        from daco_rt.dictionary.figures import write_figures
        from daco_rt.dictionary.report import diagnose, save_report

        report = diagnose(dictionary, means, block=arguments.block, identification=identification)
        figures = write_figures(report, arguments.figures, kind=arguments.format)
        save_report(report, arguments.figures / "diagnostics.json")
    summary = _summary(dictionary, identification, report, figures)
    if arguments.json:
        print_json(summary)
    else:
        _print(summary, dictionary)
    return 0


def _reader(
    arguments: argparse.Namespace, means: ConceptMeans
) -> Callable[[ConceptDictionary], Identification] | None:
    """What identifies the held-out texts with a dictionary, once there is one."""
    if bool(arguments.held_out) != bool(arguments.model or arguments.checkpoint):
        raise DacoError(
            "held-out texts need the model that reads them; give --held-out and --model or --checkpoint"
        )
    if not arguments.held_out:
        return None
    from daco_rt.concepts.texts import load_stimuli
    from daco_rt.dictionary.identification import identify
    from daco_rt.models import model_identity, resolve_checkpoint
    from daco_rt.models.loading import load_torch

    stimuli = list(load_stimuli(arguments.held_out))
    checkpoint = resolve_checkpoint(arguments.model, arguments.checkpoint)
    difference = means.model.difference(model_identity(checkpoint))
    if difference is not None:
        raise DacoError(f"{arguments.means} was not harvested from {checkpoint.label}: {difference}")
    model, tokenizer = load_torch(checkpoint.path, arguments.device)
    return lambda dictionary: identify(dictionary, model, tokenizer, stimuli)


def _check_figures(arguments: argparse.Namespace, means: ConceptMeans) -> None:
    if arguments.figures is None:
        if arguments.block is not None:
            raise DacoError("--block chooses what figures show; give --figures too")
        return
    from daco_rt._plot import require_matplotlib

    require_matplotlib()
    if arguments.block not in (None, *means.blocks):
        raise DacoError(
            f"{means.path} has no block {arguments.block}; available: {', '.join(map(str, means.blocks))}"
        )


def _summary(
    dictionary: ConceptDictionary,
    identification: Identification | None,
    report: dict[str, Any] | None,
    figures: tuple[Path, ...],
) -> dict[str, Any]:
    return {
        "path": str(dictionary.path),
        "concepts": dictionary.size,
        "dim": dictionary.dim,
        "blocks": list(dictionary.blocks),
        **{key: dictionary.recipe[key] for key in ("position", "centre", "remove_shared", "minimum")},
        "excluded": dictionary.recipe["excluded"],
        "rejected": dictionary.recipe["rejected"],
        "norms": dictionary.recipe["norms"],
        "identification": None if identification is None else identification.to_dict(),
        "figures": [str(path) for path in figures],
        "diagnostics": report,
    }


def _print(summary: dict[str, Any], dictionary: ConceptDictionary) -> None:
    excluded = summary["excluded"]
    if excluded:
        names = [f"{name} ({count})" for name, count in list(excluded.items())[:10]]
        more = f" and {len(excluded) - 10} more" if len(excluded) > 10 else ""
        print(
            f"left out with fewer than {summary['minimum']} readings: {', '.join(names)}{more}; "
            "all are named in manifest.json"
        )
    found = summary["identification"]
    if found is not None:
        print(
            f"nearest of {found['atoms']} atoms is the right concept (and among the nearest 5), % of texts:"
        )
        for centre, by_block in found["centres"].items():
            kinds = list(next(iter(by_block.values()))["by_kind"])
            rows = [
                {"block": block, **{kind: _share(scores["by_kind"][kind]) for kind in kinds}}
                for block, scores in by_block.items()
            ]
            print(f"readings centred on the mean of {CENTRED[centre]}:")
            print_table(("block", *kinds), rows, ("block", *kinds))
        for reason, count in found["skipped"].items():
            print(f"not read: {count} × {reason}")
    for path in summary["figures"]:
        print(f"drew {path}")
    blocks = ", ".join(map(str, dictionary.blocks))
    print(f"wrote {dictionary.path}: {dictionary.size} concepts at blocks {blocks}")
    print(f"next: daco-rt inspect {dictionary.path} --nearest {dictionary.concepts[0].name!r}")


def _share(scores: dict[str, Any]) -> str:
    return f"{100 * scores['top1']:.1f} ({100 * scores['top5']:.1f})" if scores["texts"] else "-"
