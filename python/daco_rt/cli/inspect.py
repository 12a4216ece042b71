"""``daco-rt inspect``: print what an artifact holds."""

from __future__ import annotations

import argparse

from daco_rt.console import add_json, print_json, print_tree

EPILOG = """\
examples:
  daco-rt inspect bundles/smol-internvl
  daco-rt inspect bundles/smol-internvl/pack --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("path", help="a pack, dictionary, SAE, bundle or checkpoint folder")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print one artifact as a tree."""
    from daco_rt.artifacts.describe import describe

    summary = describe(arguments.path)
    if arguments.json:
        print_json(summary)
    else:
        print_tree(arguments.path, summary)
    return 0
