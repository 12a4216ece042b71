"""``daco-rt stimuli``: the texts of a concept table, or its pairs of captions and pictures from a corpus."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from daco_rt.cli import pairs
from daco_rt.console import add_json, print_json, print_table
from daco_rt.errors import DacoError

EPILOG = """\
examples:
  daco-rt stimuli built-in --output texts.jsonl.gz
  daco-rt stimuli concepts.jsonl.gz --output texts.jsonl.gz --count 27
  daco-rt stimuli concepts.jsonl --output texts.jsonl --kind definition --kind example --minimum 3
  daco-rt stimuli built-in --corpus cc3m:Train_GCC-training.tsv --images images \\
      --embedder openai/clip-vit-large-patch14 --output pairs.parquet
  daco-rt stimuli built-in --corpus folder:pictures --retriever lexical --output pairs.parquet

Texts: each line has the text, the characters at which the concept's word stands, and the row of the concept.

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
    pairs.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the texts or the pairs of one table."""
    if arguments.corpus is not None:
        if arguments.kind or arguments.format:
            raise DacoError("--kind and --format are of texts; leave them out with --corpus")
        return pairs.run(arguments)
    if given := pairs.given(arguments):
        raise DacoError(f"{given[0]} is of pairs; give --corpus KIND:PLACE with it")
    return _texts(arguments)


def _texts(arguments: argparse.Namespace) -> int:
    from daco_rt.concepts.table import load_table, shipped_table
    from daco_rt.concepts.texts import COUNT, FORMATS, KINDS, make_stimuli, save_stimuli

    table = shipped_table() if arguments.table == "built-in" else load_table(arguments.table)
    found = make_stimuli(
        table,
        count=COUNT if arguments.count is None else arguments.count,
        minimum=arguments.minimum,
        kinds=tuple(arguments.kind or KINDS),
        markers=FORMATS[arguments.format or "chatml"],
    )
    save_stimuli(found.stimuli, arguments.output, overwrite=arguments.force)
    counts = Counter(found.counts.values())
    if arguments.json:
        print_json(
            {
                "file": str(arguments.output),
                "texts": len(found.stimuli),
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
    print(f"wrote {arguments.output}: {len(found.stimuli)} texts of {len(found.counts)} concepts")
    return 0


def print_left_out(excluded: dict[str, int], minimum: int, what: str) -> None:
    """Name the first concepts that had too little."""
    if excluded:
        names = list(excluded)
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        print(f"left out with fewer than {minimum} {what}: {', '.join(names[:10])}{more}")
