"""``daco-rt build``: everything from words to packs, by one configuration file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from daco_rt.console import add_json, print_json, print_table
from daco_rt.errors import DacoError

if TYPE_CHECKING:
    from daco_rt.pipeline import StepReport

EPILOG = """\
examples:
  daco-rt build configs/smol-small.yaml
  daco-rt build configs/smol-small.yaml --dry-run
  daco-rt build configs/smol.yaml --output builds/full --until dictionary

Steps whose settings, inputs and results have not changed are skipped; one that was interrupted goes on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("config", type=Path, help="a YAML file; docs/build.md explains its keys")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where everything goes (default: builds/NAME-OF-CONFIG)"
    )
    parser.add_argument("--until", metavar="STEP", help="stop after this step, for example dictionary")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto (default auto)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--force", action="store_true", help="run every step again")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build, or say what would be built."""
    from daco_rt.pipeline import build, plan, read_config

    config = read_config(arguments.config)
    folder = arguments.output or Path("builds") / arguments.config.stem
    if arguments.dry_run:
        if arguments.force or arguments.until:
            raise DacoError("--dry-run shows every step as it stands; leave --force and --until out")
        found = plan(config, folder)
        if arguments.json:
            print_json([vars(row) for row in found])
        else:
            rows = [{"step": row.name, "state": row.state, "made": row.summary} for row in found]
            print_table(("step", "state", "made"), rows, ("step", "state", "made"))
        return 0
    report = build(
        config,
        folder,
        until=arguments.until,
        device=arguments.device,
        force=arguments.force,
        report=(lambda _: None) if arguments.json else _print,
    )
    if arguments.json:
        print_json(report.to_dict())
        return 0
    print(f"wrote {report.folder}")
    for path in list(report.packs.values())[:1]:
        print(f"next: daco-rt export --model internvl --checkpoint {config.model} --pack {path}")
    return 0


def _print(row: StepReport) -> None:
    took = "up to date" if row.state == "up to date" else f"{row.seconds:.1f} s"
    print(f"{row.name:<16} {took:>10}  {row.summary}", flush=True)
