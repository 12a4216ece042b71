"""``daco-rt verify``: prove on this machine that a bundle steers as it should."""

from __future__ import annotations

import argparse

from daco_rt.console import add_json, print_json

EPILOG = """\
examples:
  daco-rt verify bundles/smol-internvl
  daco-rt verify bundles/mine --checkpoint ./my-internvl --policy strict --full

Exit status: 0 if every check passed, 1 if one failed, 2 if the bundle cannot be opened. Checks that cannot
run here (no checkpoint at hand, no custom-op library) are skipped and say why.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("bundle", help="a folder written by daco-rt export")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR|NAME",
        help="the Hugging Face checkpoint to compare with (default: the one that was exported, if at hand)",
    )
    parser.add_argument("--policy", help="policy to verify (default: the pack's default)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate per prompt (default 32)")
    parser.add_argument("--full", action="store_true", help="hash referenced weight files in full too")
    parser.add_argument("--no-model", action="store_true", help="leave out the comparison with Hugging Face")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Verify one bundle and print the table of checks."""
    from daco_rt.export.verify import verify_bundle

    report = verify_bundle(
        arguments.bundle,
        checkpoint=arguments.checkpoint,
        policy=arguments.policy,
        tokens=arguments.tokens,
        full=arguments.full,
        compare_model=not arguments.no_model,
    )
    if arguments.json:
        print_json(report.to_dict())
    else:
        report.print()
    return 0 if report.passed else 1
