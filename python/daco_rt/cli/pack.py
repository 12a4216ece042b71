"""``daco-rt pack``: compile a policy file with a dictionary or with SAEs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from daco_rt.console import add_json, print_json, print_table
from daco_rt.errors import DacoError

if TYPE_CHECKING:
    from daco_rt.artifacts import Pack, Policy

EPILOG = """\
examples:
  daco-rt pack policies.yaml --output packs/mine
  daco-rt pack policies.yaml --dictionary dictionaries/smol --output packs/mine --force
  daco-rt pack policies.yaml --sae 15=saes/15 --sae 16=saes/16 --norms dictionaries/smol --output packs/sae
  daco-rt pack policies.yaml --check

A dictionary may also be named by its built-in checkpoint: --dictionary smol-internvl.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("policies", type=Path, help="a YAML file of policies")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the pack to make")
    parser.add_argument("--dictionary", metavar="DIR", help="in place of the file's own source")
    parser.add_argument(
        "--sae",
        action="append",
        default=[],
        metavar="BLOCK=DIR",
        help="an SAE of a block; repeat for several",
    )
    parser.add_argument(
        "--norms", metavar="DIR", help="a dictionary that knows the median norms that SAEs do not"
    )
    parser.add_argument(
        "--concepts",
        metavar="FILE",
        help="a concept table whose labels replace the dictionary's, or 'built-in'",
    )
    parser.add_argument("--check", action="store_true", help="only check the file; write nothing")
    parser.add_argument("--force", action="store_true", help="replace an existing pack")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check or compile one file."""
    from daco_rt.steering.policy_file import build_pack, read_policies

    file = read_policies(arguments.policies)
    if arguments.check:
        if arguments.output is not None:
            raise DacoError("--check writes nothing; leave --output out")
        names = ", ".join(spec.name for spec in file.policies)
        print(f"{arguments.policies}: {len(file.policies)} policies ({names}), default {file.default}")
        return 0
    if arguments.output is None:
        raise DacoError("--output is missing; name the folder to make, or pass --check")
    pack = build_pack(
        file,
        arguments.output,
        dictionary=_built_in(arguments.dictionary),
        saes=_saes(arguments.sae) or None,
        norms=_built_in(arguments.norms),
        concepts=arguments.concepts,
        overwrite=arguments.force,
    )
    rows: list[dict[str, object]] = [
        {
            "policy": policy.name + (" (default)" if policy.name == pack.default_policy else ""),
            "positions": policy.positions,
            "blocks": ", ".join(map(str, policy.blocks)),
            "edited": _edited(pack, policy),
        }
        for policy in pack.policies
    ]
    if arguments.json:
        print_json({"pack": str(pack.path), "op": pack.op, "atoms": pack.atoms, "policies": rows})
        return 0
    for row, policy in zip(rows, pack.policies, strict=True):
        row["edited"] = ", ".join(map(str, sorted(set(_edited(pack, policy).values()))))
    print_table(
        ("policy", "positions", "blocks", "edited atoms"), rows, ("policy", "positions", "blocks", "edited")
    )
    print(f"wrote {pack.path}: {pack.op}, {pack.atoms} atoms at blocks {', '.join(map(str, pack.blocks))}")
    return 0


def _edited(pack: Pack, policy: Policy) -> dict[int, int]:
    """Block → atoms whose code the policy changes."""
    return {block: int((pack.operands(block)["gain"][policy.slot] != 1).sum()) for block in policy.blocks}


def _built_in(name: str | None) -> str | Path | None:
    from daco_rt.dictionary import dictionary_for

    return name if name is None else dictionary_for(name) or name


def _saes(texts: list[str]) -> dict[int, str]:
    found: dict[int, str] = {}
    for text in texts:
        block, _, folder = text.partition("=")
        if not block.isdecimal() or not folder:
            raise DacoError(f"--sae must be BLOCK=DIR, such as 15=saes/15, got {text!r}")
        if int(block) in found:
            raise DacoError(f"--sae gives block {block} twice; give it once")
        found[int(block)] = folder
    return found
