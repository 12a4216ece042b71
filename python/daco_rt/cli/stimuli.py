"""``daco-rt stimuli``: the texts of a concept table, or its pairs of captions and pictures from a corpus."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from daco_rt.cli import pairs
from daco_rt.console import add_json, print_json, print_table
from daco_rt.errors import DacoError

if TYPE_CHECKING:
    from daco_rt.concepts.texts import TextStimulus

EPILOG = """\
examples:
  daco-rt stimuli built-in --output texts.jsonl.gz
  daco-rt stimuli concepts.jsonl.gz --output texts.jsonl.gz --count 27
  daco-rt stimuli concepts.jsonl --output texts.jsonl --kind definition --kind example --minimum 3
  daco-rt stimuli built-in --corpus cc3m:Train_GCC-training.tsv --images images \\
      --embedder openai/clip-vit-large-patch14 --output pairs.parquet
  daco-rt stimuli built-in --corpus folder:pictures --retriever lexical --output pairs.parquet

  daco-rt stimuli built-in --output texts.jsonl.gz --held-out unseen.jsonl.gz

Texts: each line has the text, the characters at which the concept's word stands, and the row of the concept.
--held-out writes texts to test a dictionary on (daco-rt dictionary --held-out): of each concept the next two
texts after those of --output, and two that give its definition without the word.

Pairs (with --corpus): a Parquet file with a row for each pair of each concept, sign 1 for X+ and -1 for X-.
The corpus is cc3m:FILE.tsv, webdataset:FOLDER, parquet:FILE, folder:DIR or text:FILE. With --embedder it is
embedded once, into OUTPUT.embeddings or --embeddings, and compared with every concept; --retriever lexical
needs no weights and takes captions that say the word. An interrupted run goes on where it stopped. What was
skipped is listed in OUTPUT.problems.jsonl.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("table", help="a table written by daco-rt concepts, or 'built-in'")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="a .jsonl, .jsonl.gz or, of pairs, .parquet file",
    )
    parser.add_argument(
        "--count", type=int, metavar="N", help="most texts a concept (default 7), or pairs of each sign (27)"
    )
    parser.add_argument(
        "--minimum", type=int, default=4, metavar="N", help="concepts with fewer are left out (default 4)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    add_json(parser)
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--kind",
        action="append",
        choices=("definition", "example", "sentence"),
        help="use only this kind of text; repeat for several",
    )
    texts.add_argument("--format", choices=("chatml", "plain"), help="markers around turns (default chatml)")
    texts.add_argument(
        "--held-out", type=Path, metavar="FILE", help="also write texts that are not in the output"
    )
    pairs.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the texts or the pairs of one table."""
    if arguments.corpus is not None:
        if arguments.kind or arguments.format or arguments.held_out:
            raise DacoError("--kind, --format and --held-out are of texts; leave them out with --corpus")
        return pairs.run(arguments)
    if given := pairs.given(arguments):
        raise DacoError(f"{given[0]} is of pairs; give --corpus KIND:PLACE with it")
    return _texts(arguments)


def _texts(arguments: argparse.Namespace) -> int:
    from daco_rt._files import refuse_existing
    from daco_rt.concepts.held_out import HELD_OUT, definition_stimuli, split_stimuli
    from daco_rt.concepts.table import load_table, shipped_table
    from daco_rt.concepts.texts import COUNT, FORMATS, KINDS, make_stimuli, save_stimuli

    table = shipped_table() if arguments.table == "built-in" else load_table(arguments.table)
    markers = FORMATS[arguments.format or "chatml"]
    count = COUNT if arguments.count is None else arguments.count
    found = make_stimuli(
        table,
        count=count + (HELD_OUT if arguments.held_out else 0),
        minimum=arguments.minimum,
        kinds=tuple(arguments.kind or KINDS),
        markers=markers,
    )
    held_out: list[TextStimulus] = []
    if arguments.held_out:
        found.stimuli, held_out = split_stimuli(found.stimuli, harvest=count, held_out=HELD_OUT)
        held_out += definition_stimuli(table, markers=markers, skipped=found.skipped)
        found.counts = {row: min(texts, count) for row, texts in found.counts.items()}
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
    print_left_out(found.excluded, arguments.minimum, "texts")
    if arguments.held_out:
        print(f"wrote {arguments.held_out}: {len(held_out)} texts that are not among them")
    print(f"wrote {arguments.output}: {len(found.stimuli)} texts of {len(found.counts)} concepts")
    return 0


def print_left_out(excluded: dict[str, int], minimum: int, what: str) -> None:
    """Name the first concepts that had too little."""
    if excluded:
        names = list(excluded)
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        print(f"left out with fewer than {minimum} {what}: {', '.join(names[:10])}{more}")
