"""``daco-rt concepts``: choose concepts from WordNet, label them, write one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from daco_rt.console import add_json, print_json, print_table
from daco_rt.errors import DacoError

EPILOG = """\
examples:
  daco-rt concepts --output concepts.jsonl.gz
  daco-rt concepts --output small.jsonl --size 1500 --wordnet WordNet-3.0/dict
  daco-rt concepts --table concepts.jsonl.gz --output labelled.jsonl.gz --labels mine.tsv
  daco-rt concepts --output expert.jsonl.gz --endpoint http://localhost:8000/v1 --endpoint-model qwen

Of several labels the hand-edited one wins, then the endpoint's, then the rules'. The endpoint's key is read
from DACO_RT_API_KEY; its labels are kept in a cache, so an interrupted run goes on where it stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="a .jsonl or .jsonl.gz file"
    )
    parser.add_argument(
        "--wordnet", type=Path, metavar="DIR", help="a folder with data.noun (default: a usual place)"
    )
    parser.add_argument(
        "--table",
        metavar="FILE",
        help="label this table afresh instead of choosing from WordNet; 'built-in' names ours",
    )
    parser.add_argument(
        "--size", type=int, metavar="N", help="how many concepts (default 15000, or all of --table)"
    )
    parser.add_argument("--rules", type=Path, metavar="FILE", help="label rules (default: the package's own)")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="a hand-edited table that overrides all others"
    )
    parser.add_argument(
        "--rank", choices=("familiar", "depth"), help="by what (default familiar): docs/concepts.md"
    )
    parser.add_argument("--no-keep", action="store_true", help="drop labelled concepts whose rank is too low")
    endpoint = parser.add_argument_group("an expert model behind an OpenAI-compatible endpoint")
    endpoint.add_argument("--endpoint", metavar="URL", help="base address, such as http://localhost:8000/v1")
    endpoint.add_argument("--endpoint-model", metavar="NAME", help="name of the model there")
    endpoint.add_argument(
        "--cache", type=Path, metavar="FILE", help="where its labels are kept (default: beside --output)"
    )
    endpoint.add_argument(
        "--batch", type=int, default=20, metavar="N", help="concepts in a request (default 20)"
    )
    endpoint.add_argument(
        "--workers", type=int, default=4, metavar="N", help="requests at a time (default 4)"
    )
    endpoint.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds a request (default 120)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make one table."""
    from daco_rt._files import refuse_existing
    from daco_rt.concepts.labels import HandTable, Labeller, apply_labels
    from daco_rt.concepts.rules import load_rules
    from daco_rt.concepts.select import select_concepts, subset_concepts
    from daco_rt.concepts.table import count_labels, load_table, save_table, shipped_table
    from daco_rt.concepts.wordnet import WordNet, find_wordnet
    from daco_rt.progress import progress

    if not arguments.force:
        refuse_existing(arguments.output)
    rules = load_rules(arguments.rules)
    hand = None if arguments.labels is None else HandTable(arguments.labels)
    expert = _endpoint(arguments)
    if arguments.table is not None:
        if arguments.wordnet is not None:
            raise DacoError("--table and --wordnet exclude each other: a table is labelled as it is")
        if arguments.rank is not None or arguments.no_keep:
            raise DacoError("--rank and --no-keep choose from WordNet; leave them out with --table")
        table = shipped_table() if arguments.table == "built-in" else load_table(arguments.table)
        if arguments.size is not None:
            table = subset_concepts(table, arguments.size)
    else:
        folder = find_wordnet(arguments.wordnet)
        with progress(f"choosing concepts from {folder}"):
            table = select_concepts(
                WordNet(folder),
                size=15_000 if arguments.size is None else arguments.size,
                rules=rules,
                rank=arguments.rank or "familiar",
                keep_labelled=not arguments.no_keep,
            )
    labellers: list[Labeller] = [rules]
    labellers += [labeller for labeller in (expert, hand) if labeller is not None]
    table = apply_labels(table, labellers)
    save_table(table, arguments.output, overwrite=arguments.force)
    counts = count_labels(table)
    unanswered = [] if expert is None else expert.unanswered
    if arguments.json:
        print_json(
            {
                "file": str(arguments.output),
                "concepts": len(table),
                "labels": counts,
                "unanswered": unanswered,
            }
        )
        return 0
    rows = [
        {"label": label, "group": group or "(none)", "concepts": number}
        for label, groups in counts.items()
        for group, number in groups.items()
    ]
    print_table(("label", "group", "concepts"), rows, ("label", "group", "concepts"))
    print(f"wrote {arguments.output}: {len(table)} concepts")
    if unanswered:
        names = ", ".join(unanswered[:10])
        print(f"{len(unanswered)} concepts got no usable answer and keep their other label: {names}")
    return 0


def _endpoint(arguments: argparse.Namespace):
    from daco_rt.concepts.endpoint import EndpointLabeller

    if arguments.endpoint is None:
        if arguments.endpoint_model is not None or arguments.cache is not None:
            raise DacoError("--endpoint-model and --cache need --endpoint, the address to ask")
        return None
    cache = arguments.cache
    if cache is None:
        cache = arguments.output.with_name(arguments.output.name.split(".")[0] + ".labels-cache.jsonl")
    return EndpointLabeller(
        arguments.endpoint,
        arguments.endpoint_model or "",
        cache,
        batch=arguments.batch,
        workers=arguments.workers,
        timeout=arguments.timeout,
    )
