"""``daco-rt inspect``: print what an artifact holds."""

from __future__ import annotations

import argparse

from daco_rt.console import add_json, print_json, print_table, print_tree
from daco_rt.errors import DacoError

EPILOG = """\
examples:
  daco-rt inspect bundles/smol-internvl
  daco-rt inspect bundles/smol-internvl/pack --json
  daco-rt inspect dictionaries/smol --nearest dagger --block 16 --count 10

--nearest lists the atoms with the largest cosine to that of a concept: of a dictionary, a pack, a bundle's
pack, or an annotated SAE.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("path", help="a pack, dictionary, SAE, bundle or checkpoint folder")
    parser.add_argument("--nearest", metavar="CONCEPT", help="list the atoms nearest to a concept's")
    parser.add_argument("--block", type=int, metavar="L", help="at this block (default: the middle one)")
    parser.add_argument("--count", type=int, default=10, metavar="N", help="how many (default 10)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print one artifact as a tree, or the neighbours of one of its concepts as a table."""
    if arguments.nearest is not None:
        return _nearest(arguments)
    if arguments.block is not None:
        raise DacoError("--block belongs to --nearest; give a concept too")
    from daco_rt.artifacts.describe import describe

    summary = describe(arguments.path)
    if arguments.json:
        print_json(summary)
    else:
        print_tree(arguments.path, summary)
    return 0


def _nearest(arguments: argparse.Namespace) -> int:
    from daco_rt.dictionary.neighbours import open_atoms

    atoms = open_atoms(arguments.path, block=arguments.block)
    found = atoms.nearest(arguments.nearest, count=arguments.count)
    rows = [
        {
            "cosine": round(each.cosine, 4),
            "name": each.concept.name,
            "label": each.concept.label,
            "group": each.concept.group,
        }
        for each in found
    ]
    if arguments.json:
        print_json(
            {"path": arguments.path, "block": atoms.block, "concept": arguments.nearest, "nearest": rows}
        )
    else:
        print_table(("cosine", "concept", "label", "group"), rows, ("cosine", "name", "label", "group"))
    return 0
