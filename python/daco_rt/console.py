"""What every command shares: turning errors into one sentence, JSON, tables and trees.

Output for people goes to standard output, progress and errors to standard error; ``--json`` prints one
JSON document instead. Exit status: 0 done, 1 a check failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from daco_rt.errors import DacoError


def guarded(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, run, and turn what a user can mend into one sentence on standard error."""
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except DacoError as error:
        return _say(parser.prog, error)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        return _say(parser.prog, f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; nothing was half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _say(program: str, error: object) -> int:
    print(f"{program}: error: {error}", file=sys.stderr)
    return 2


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the ``--json`` switch."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def print_json(value: Any) -> None:
    """Print one JSON document."""
    json.dump(value, sys.stdout, indent=2, default=str)
    print()


def print_table(titles: Sequence[str], rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Print rows as aligned columns; long cells fold on a terminal and stay whole in a pipe."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(str(row[key]) for key in keys))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def print_tree(title: str, summary: Mapping[str, Any]) -> None:
    """Print nested mappings as a tree."""
    from rich.console import Console
    from rich.tree import Tree

    def grow(node: Tree, value: Mapping[str, Any]) -> None:
        for key, item in value.items():
            if isinstance(item, Mapping):
                grow(node.add(f"{key}:"), item)
            else:
                node.add(f"{key}: {item}")

    tree = Tree(title)
    grow(tree, summary)
    Console(soft_wrap=not sys.stdout.isatty(), markup=False, highlight=False).print(tree)
