"""``daco-rt evaluate``: run an evaluation that a configuration describes, and write its report."""

from __future__ import annotations

import argparse

from daco_rt.console import add_json, print_json, print_table

EPILOG = """\
examples:
  daco-rt evaluate configs/evaluate-pocket.yaml --output runs/pocket
  daco-rt evaluate mine.yaml --part dev
  daco-rt evaluate mine.yaml --report-only

A run that was stopped goes on where it was: give the same command again. Tune on the development part
(--part dev, into a folder of its own), then run the test part once. docs/evaluation.md describes the
configuration, the layouts of the benchmarks and every number of the report.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("config", help="a YAML file: model, benchmarks, methods, judges")
    parser.add_argument("--output", metavar="DIR", help="folder of the run (default: what the file says)")
    parser.add_argument("--part", choices=("dev", "test", "all"), help="side of the split to run")
    parser.add_argument("--report-only", action="store_true", help="write the report from what is there")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate, judge and report."""
    from daco_rt.evaluate.config import read_config
    from daco_rt.evaluate.report import write_report
    from daco_rt.evaluate.run import Evaluation

    config = read_config(arguments.config, output=arguments.output, part=arguments.part)
    evaluation = Evaluation(config)
    if not arguments.report_only:
        evaluation.run()
    report = write_report(evaluation)
    if arguments.json:
        print_json(report.to_json())
        return 0
    rows = report.summary()
    keys = list(rows[0])
    print_table(keys, rows, keys)
    for path in report.files:
        print(f"wrote {path}")
    return 0
