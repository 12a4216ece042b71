"""``daco-rt evaluate``: run an evaluation that a configuration describes, and write its report."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from daco_rt.console import add_json, print_json, print_table

if TYPE_CHECKING:
    from daco_rt.evaluate.config import EvaluationConfig

EPILOG = """\
examples:
  daco-rt evaluate configs/evaluate.yaml --output runs/smol
  daco-rt evaluate mine.yaml --part dev
  daco-rt evaluate mine.yaml --report-only
  daco-rt evaluate mine.yaml --read 40

With a protocol section in the configuration every strength is tried on the development part, the choice is
frozen in chosen.json, and the test part runs once, on what was chosen. --part dev stops before the choice.
Without one, the part that is asked for runs under every strength: an exploration.

A run that was stopped goes on where it was: give the same command again. Answers about which a judge could
not be asked are unjudged, with a warning at the end, and that command asks about them again; a choice that
rests on them is not made, and the status is 1. docs/evaluation.md describes the
configuration, the protocol, the layouts of the benchmarks and every number of the report.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("config", help="a YAML file: model, benchmarks, methods, judges")
    parser.add_argument("--output", metavar="DIR", help="folder of the run (default: what the file says)")
    parser.add_argument("--part", choices=("dev", "test", "all"), help="side of the split to run")
    parser.add_argument("--report-only", action="store_true", help="write the report from what is there")
    parser.add_argument(
        "--read",
        type=int,
        metavar="N",
        help="write N answers to read by hand, without their methods, into read.tsv, and nothing else",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate, judge and report."""
    from daco_rt.evaluate.config import read_config

    config = read_config(arguments.config, output=arguments.output, part=arguments.part)
    if arguments.read is not None:
        return _write_sample(config, arguments.read)
    if config.protocol is None:
        from daco_rt.evaluate.report import write_report
        from daco_rt.evaluate.run import Evaluation

        evaluation = Evaluation(config)
        if not arguments.report_only:
            evaluation.run()
        report, held = write_report(evaluation), False
    else:
        from daco_rt.evaluate.protocol_run import ProtocolRun
        from daco_rt.evaluate.report import write_protocol_report

        under = ProtocolRun(config)
        if not arguments.report_only:
            under.run(stop_before_test=arguments.part == "dev")
        report = write_protocol_report(under)
        held = under.test is None and arguments.part != "dev" and bool(under.held)
    if arguments.json:
        print_json(report.to_json())
    else:
        rows = report.summary()
        keys = list(rows[0])
        print_table(keys, rows, keys)
        for path in report.files:
            print(f"wrote {path}")
    for pending in report.pending:
        print(f"warning: {pending}", file=sys.stderr)
    if held:
        print("warning: nothing was chosen and the test part waits for these verdicts", file=sys.stderr)
    return int(held)


def _write_sample(config: EvaluationConfig, count: int) -> int:
    """Write answers to read, of the test part where there is a protocol."""
    from daco_rt.errors import DacoError
    from daco_rt.evaluate.content import require
    from daco_rt.evaluate.protocol_run import ProtocolRun
    from daco_rt.evaluate.reading import write_sample
    from daco_rt.evaluate.run import Evaluation

    evaluation = Evaluation(config) if config.protocol is None else ProtocolRun(config).test
    if evaluation is None:
        raise DacoError(f"{config.output}: the test part has not been run, so there is nothing to read yet")
    require(evaluation)
    for path in write_sample(evaluation, count, config.output, seed=config.split_seed):
        print(f"wrote {path}")
    return 0
