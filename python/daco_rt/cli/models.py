"""``daco-rt models``: list or fetch the built-in checkpoints."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from daco_rt.console import add_json, print_json, print_table

EPILOG = """\
examples:
  daco-rt models list
  daco-rt models get smol-internvl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions on ``parser``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="the built-in checkpoints, and which are at hand")
    add_json(listing)
    listing.set_defaults(act=_list)
    get = actions.add_parser("get", help="fetch or assemble one")
    get.add_argument("name", help="for example smol-internvl, or smol for short")
    get.set_defaults(act=_get)


def run(arguments: argparse.Namespace) -> int:
    """Do what the action says."""
    status: int = arguments.act(arguments)
    return status


def _list(arguments: argparse.Namespace) -> int:
    from daco_rt.models.catalogue import models_available

    rows = [asdict(model) | {"state": model.state} for model in models_available()]
    if arguments.json:
        print_json(rows)
        return 0
    print_table(("name", "licence", "where", "what it is"), rows, ("name", "licence", "state", "description"))
    return 0


def _get(arguments: argparse.Namespace) -> int:
    from daco_rt.models.catalogue import ensure

    # "smol" is short for the model of the first family, as everywhere a checkpoint is named.
    name = arguments.name if "-" in arguments.name else f"{arguments.name}-internvl"
    print(ensure(name))
    return 0
