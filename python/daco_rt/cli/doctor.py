"""``daco-rt doctor``: say what is installed, built and usable."""

from __future__ import annotations

import argparse

from daco_rt.console import add_json, print_json, print_table

EPILOG = """\
examples:
  daco-rt doctor
  daco-rt doctor --json

Exit status: 1 if something that is installed does not work. Absent parts are optional.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Examine this installation."""
    from daco_rt.doctor import examine

    findings = examine()
    if arguments.json:
        print_json([finding._asdict() for finding in findings])
    else:
        print_table(("part", "state", "detail"), [f._asdict() for f in findings], ("part", "state", "detail"))
    return 1 if any(finding.state == "broken" for finding in findings) else 0
