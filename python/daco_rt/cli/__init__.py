"""``daco-rt``: every verb is a thin call of a public function."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from daco_rt import __version__
from daco_rt.console import add_json, guarded, print_json, print_table, print_tree


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status instead of raising."""
    return guarded(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="daco-rt",
        description="Concept steering inside the inference engine of multimodal LLMs.",
        epilog="Start here: daco-rt export --model internvl, then daco-rt generate BUNDLE --prompt …",
    )
    parser.add_argument("--version", action="version", version=f"daco-rt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary, build in (
        ("export", "write a bundle: the model's ONNX graphs with steering baked in", _export),
        ("verify", "prove on this machine that a bundle steers as it should", _verify),
        ("generate", "answer a prompt, with pictures, under a policy", _generate),
        ("concepts", "choose concepts from WordNet and label them", _concepts),
        ("stimuli", "write the texts in which a table's concepts are said", _stimuli),
        ("pack", "compile a policy file with a dictionary or SAEs into a pack", _pack),
        ("inspect", "print what any artifact holds", _inspect),
        ("models", "list or fetch the built-in checkpoints", _models),
        ("doctor", "say what is installed, built and usable", _doctor),
    ):
        verb = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        build(verb)
    return parser


_VERIFY_EXAMPLES = """\
examples:
  daco-rt verify bundles/smol-internvl
  daco-rt verify bundles/mine --checkpoint ./my-internvl --policy strict --full

Exit status: 0 if every check passed, 1 if one failed, 2 if the bundle cannot be opened. Checks that cannot
run here (no checkpoint at hand, no custom-op library) are skipped and say why.
"""
_INSPECT_EXAMPLES = """\
examples:
  daco-rt inspect bundles/smol-internvl
  daco-rt inspect bundles/smol-internvl/pack --json
"""
_MODELS_EXAMPLES = """\
examples:
  daco-rt models list
  daco-rt models get smol-internvl
"""
_DOCTOR_EXAMPLES = """\
examples:
  daco-rt doctor
  daco-rt doctor --json

Exit status: 1 if something that is installed does not work. Absent parts are optional.
"""


def _export(parser: argparse.ArgumentParser) -> None:
    from daco_rt.export import command

    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _VERIFY_EXAMPLES
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
    parser.set_defaults(run=_run_verify)


def _run_verify(arguments: argparse.Namespace) -> int:
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


def _generate(parser: argparse.ArgumentParser) -> None:
    from daco_rt.cli import generate

    generate.add_arguments(parser)
    parser.set_defaults(run=generate.run)


def _concepts(parser: argparse.ArgumentParser) -> None:
    from daco_rt.cli import concepts

    concepts.add_arguments(parser)
    parser.set_defaults(run=concepts.run)


def _stimuli(parser: argparse.ArgumentParser) -> None:
    from daco_rt.cli import stimuli

    stimuli.add_arguments(parser)
    parser.set_defaults(run=stimuli.run)


def _pack(parser: argparse.ArgumentParser) -> None:
    from daco_rt.cli import pack

    pack.add_arguments(parser)
    parser.set_defaults(run=pack.run)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _INSPECT_EXAMPLES
    parser.add_argument("path", help="a pack, dictionary, SAE, bundle or checkpoint folder")
    add_json(parser)
    parser.set_defaults(run=_run_inspect)


def _run_inspect(arguments: argparse.Namespace) -> int:
    from daco_rt.artifacts.describe import describe

    summary = describe(arguments.path)
    if arguments.json:
        print_json(summary)
    else:
        print_tree(arguments.path, summary)
    return 0


def _models(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _MODELS_EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="the built-in checkpoints, and which are at hand")
    add_json(listing)
    listing.set_defaults(run=_run_models_list)
    get = actions.add_parser("get", help="fetch or assemble one")
    get.add_argument("name", help="for example smol-internvl, or smol for short")
    get.set_defaults(run=_run_models_get)


def _run_models_list(arguments: argparse.Namespace) -> int:
    from daco_rt.models.catalogue import models_available

    rows = [asdict(model) | {"state": model.state} for model in models_available()]
    if arguments.json:
        print_json(rows)
        return 0
    print_table(("name", "licence", "where", "what it is"), rows, ("name", "licence", "state", "description"))
    return 0


def _run_models_get(arguments: argparse.Namespace) -> int:
    from daco_rt.models.catalogue import ensure

    # "smol" is short for the model of the first family, as everywhere a checkpoint is named.
    name = arguments.name if "-" in arguments.name else f"{arguments.name}-internvl"
    print(ensure(name))
    return 0


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _DOCTOR_EXAMPLES
    add_json(parser)
    parser.set_defaults(run=_run_doctor)


def _run_doctor(arguments: argparse.Namespace) -> int:
    from daco_rt.doctor import examine

    findings = examine()
    if arguments.json:
        print_json([finding._asdict() for finding in findings])
    else:
        print_table(("part", "state", "detail"), [f._asdict() for f in findings], ("part", "state", "detail"))
    return 1 if any(finding.state == "broken" for finding in findings) else 0
