"""``daco-rt stimuli``: the texts of a concept table."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from daco_rt.console import add_json, print_json, print_table

if TYPE_CHECKING:
    from daco_rt.concepts.texts import TextStimulus

EPILOG = """\
examples:
  daco-rt stimuli built-in --output texts.jsonl.gz
  daco-rt stimuli concepts.jsonl.gz --output texts.jsonl.gz --count 27
  daco-rt stimuli concepts.jsonl --output texts.jsonl --kind definition --kind example --minimum 3

  daco-rt stimuli built-in --output texts.jsonl.gz --held-out unseen.jsonl.gz

Each line has the text, the characters at which the concept's word stands, and the row of the concept.
--held-out writes texts to test a dictionary on (daco-rt dictionary --held-out): of each concept the next two
texts after those of --output, and two that give its definition without the word.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("table", help="a table written by daco-rt concepts, or 'built-in'")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="a .jsonl or .jsonl.gz file"
    )
    parser.add_argument("--count", type=int, default=7, metavar="N", help="most texts a concept (default 7)")
    parser.add_argument(
        "--minimum", type=int, default=4, metavar="N", help="concepts with fewer are left out (default 4)"
    )
    parser.add_argument(
        "--kind",
        action="append",
        choices=("definition", "example", "sentence"),
        help="use only this kind of text; repeat for several",
    )
    parser.add_argument(
        "--format",
        choices=("chatml", "plain"),
        default="chatml",
        help="markers around turns (default chatml)",
    )
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE", help="also write texts that are not in the output"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the texts of one table."""
    from daco_rt._files import refuse_existing
    from daco_rt.concepts.held_out import HELD_OUT, definition_stimuli, split_stimuli
    from daco_rt.concepts.table import load_table, shipped_table
    from daco_rt.concepts.texts import FORMATS, KINDS, make_stimuli, save_stimuli

    table = shipped_table() if arguments.table == "built-in" else load_table(arguments.table)
    markers = FORMATS[arguments.format]
    found = make_stimuli(
        table,
        count=arguments.count + (HELD_OUT if arguments.held_out else 0),
        minimum=arguments.minimum,
        kinds=tuple(arguments.kind or KINDS),
        markers=markers,
    )
    held_out: list[TextStimulus] = []
    if arguments.held_out:
        found.stimuli, held_out = split_stimuli(found.stimuli, harvest=arguments.count, held_out=HELD_OUT)
        held_out += definition_stimuli(table, markers=markers, skipped=found.skipped)
        found.counts = {row: min(count, arguments.count) for row, count in found.counts.items()}
        if not arguments.force:
            refuse_existing(arguments.output)
        save_stimuli(held_out, arguments.held_out, overwrite=arguments.force)
    save_stimuli(found.stimuli, arguments.output, overwrite=arguments.force)
    counts = Counter(found.counts.values())
    if arguments.json:
        print_json(
            {
                "file": str(arguments.output),
                "texts": len(found.stimuli),
                "held_out": len(held_out),
                "concepts_by_texts": dict(sorted(counts.items())),
                "kinds": dict(Counter(text.kind for text in found.stimuli)),
                "excluded": found.excluded,
                "skipped": dict(found.skipped),
            }
        )
        return 0
    rows = [{"texts": texts, "concepts": concepts} for texts, concepts in sorted(counts.items())]
    print_table(("texts a concept", "concepts"), rows, ("texts", "concepts"))
    for reason, number in sorted(found.skipped.items()):
        print(f"not used: {number} × {reason}")
    if found.excluded:
        names = list(found.excluded)
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        print(f"left out with fewer than {arguments.minimum} texts: {', '.join(names[:10])}{more}")
    if arguments.held_out:
        print(f"wrote {arguments.held_out}: {len(held_out)} texts that are not among them")
    print(f"wrote {arguments.output}: {len(found.stimuli)} texts of {len(found.counts)} concepts")
    return 0
