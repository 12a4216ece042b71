"""``daco-rt scenes``: pictures of which everything is known, as a benchmark or to read a dictionary from."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from daco_rt.console import add_json, print_json
from daco_rt.errors import DacoError

EPILOG = """\
examples:
  daco-rt scenes --output scenes
  daco-rt scenes --form pairs --output scene-pairs --count 27
  daco-rt scenes --form mm-safetybench --output scenes-mm
  daco-rt scenes --form jailbreakv --output scenes-jbv

Forms:
  test            pictures of one to three things and what they show, for the benchmark and judge "scenes"
  pairs           captioned pictures of every concept, to harvest a dictionary from
  mm-safetybench, jailbreakv
                  the official layouts of these benchmarks

The built-in checkpoint scenes-internvl is trained on such pictures. A tenth of all pairs of things never
stood together in training; half of the test scenes with two or three things show such a pair.
"""
FORMS = ("test", "pairs", "mm-safetybench", "jailbreakv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument("--form", choices=FORMS, default="test", help="what is written (default test)")
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="test: scenes (1200); pairs: pictures a concept (27); layouts: questions a scenario (12)",
    )
    parser.add_argument(
        "--described-by",
        metavar="CHECKPOINT",
        help="test: also say which scenes this model describes exactly when nothing steers it",
    )
    parser.add_argument("--unsafe", type=float, metavar="SHARE", help="test: scenes with unsafe things (0.6)")
    parser.add_argument("--seed", type=int, metavar="N", help="of everything; each form has its own default")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write one folder."""
    from daco_rt.evaluate.scene_layouts import write_scene_jailbreakv, write_scene_mm_safetybench
    from daco_rt.scenes.files import write_pairs, write_scenes

    form = arguments.form
    for option, value in (("--unsafe", arguments.unsafe), ("--described-by", arguments.described_by)):
        if value is not None and form != "test":
            raise DacoError(f"{option} is of the form test; leave it out with --form {form}")
    number = "count" if form in ("test", "pairs") else "questions"
    given = {
        number: arguments.count,
        "unsafe": arguments.unsafe,
        "seed": arguments.seed,
        "described_by": arguments.described_by,
    }
    options = {name: value for name, value in given.items() if value is not None}
    writers: dict[str, Callable[..., Path]] = {
        "test": write_scenes,
        "pairs": write_pairs,
        "mm-safetybench": write_scene_mm_safetybench,
        "jailbreakv": write_scene_jailbreakv,
    }
    writers[form](arguments.output, **options)
    pictures = sum(1 for suffix in ("png", "jpg") for _ in arguments.output.rglob(f"*.{suffix}"))
    if arguments.json:
        print_json({"folder": str(arguments.output), "form": form, "pictures": pictures})
        return 0
    print(f"wrote {arguments.output}: {pictures} pictures")
    if form == "pairs":
        place = arguments.output
        place = arguments.output
        print(
            f"next: daco-rt harvest {place}/pairs.parquet --table {place}/concepts.jsonl "
            "--checkpoint scenes-internvl --position before-word --blocks 2-4 --output means"
        )
    return 0
