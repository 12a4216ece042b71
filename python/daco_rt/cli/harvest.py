"""``daco-rt harvest``: read stimuli through a model, write the mean reading of each concept."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daco_rt.cli.blocks import parse_blocks
from daco_rt.console import add_json, print_json, print_table

if TYPE_CHECKING:
    from daco_rt.dictionary.means import ConceptMeans

POSITIONS = ("word", "word-mean", "before-word", "last", "last-prompt", "image", "all")

EPILOG = """\
examples:
  daco-rt harvest texts.jsonl.gz --table built-in --model internvl --blocks 15-19 --output means/smol
  daco-rt harvest texts.jsonl.gz --table concepts.jsonl.gz --checkpoint models/mine --blocks 12,16 \\
      --position word-mean --activations stores/mine --output means/mine

  daco-rt harvest pairs.parquet --table built-in --checkpoint models/mine --blocks 15-19 --output means/mine

The stimuli are what daco-rt stimuli wrote for the same table: texts, or pairs of pictures and captions. All
blocks are read in one pass. Called again with the same arguments it goes on where it was stopped; the result
is the same to the last bit.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("stimuli", help="a .jsonl, .jsonl.gz or .parquet file written by daco-rt stimuli")
    parser.add_argument(
        "--table", required=True, help="the table that they were made from: a file, or 'built-in'"
    )
    parser.add_argument("--model", help="model family, for its built-in checkpoint (internvl)")
    parser.add_argument("--checkpoint", metavar="DIR|ID|NAME", help="the model that reads")
    parser.add_argument("--blocks", required=True, metavar="LIST", help="15-19 or 3,5")
    parser.add_argument(
        "--position",
        choices=POSITIONS,
        default="word",
        help="where a stimulus is read: its word, the token before it, the last token, the prompt's last "
        "token before the answer, the picture, or everywhere (default word)",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the means")
    parser.add_argument(
        "--activations", type=Path, metavar="DIR", help="also fill this activation store, for daco-rt sae"
    )
    parser.add_argument("--force", action="store_true", help="begin anew where means are")
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--images", type=Path, metavar="DIR", help="where they are, if they were moved")
    pictures.add_argument(
        "--prompt", metavar="TEXT", help="what is asked about each (default: 'What is in this picture?')"
    )
    pictures.add_argument("--max-tiles", type=int, metavar="N", help="most tiles that one is cut into")
    running = parser.add_argument_group("running")
    running.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto (default auto)")
    running.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the model (default: as it is stored)",
    )
    running.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens in one pass (default: 1024 on a CPU, 4096 on a GPU)",
    )
    running.add_argument(
        "--max-tokens", type=int, default=2048, metavar="N", help="texts are cut there (default 2048)"
    )
    running.add_argument(
        "--concepts-per-shard",
        type=int,
        metavar="N",
        help="concepts behind one shard (default: as many as have about 512 stimuli)",
    )
    many = parser.add_argument_group("many processes or machines")
    many.add_argument(
        "--ray", action="store_true", help="run on Ray: the cluster of RAY_ADDRESS, or this machine"
    )
    many.add_argument("--workers", type=int, default=2, metavar="N", help="processes, each with a model")
    many.add_argument("--cpus", type=float, default=1.0, metavar="N", help="processors of a worker")
    many.add_argument("--gpus", type=float, default=0.0, metavar="N", help="GPUs of a worker")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Harvest, and say what was read."""
    from daco_rt.concepts import load_table, shipped_table
    from daco_rt.dictionary.encode import PROMPT
    from daco_rt.dictionary.harvest import HarvestPlan
    from daco_rt.dictionary.items import ItemTable, pair_items, table_concepts, text_items
    from daco_rt.models import model_identity, resolve_checkpoint

    blocks = parse_blocks(arguments.blocks)
    table = shipped_table() if arguments.table == "built-in" else load_table(arguments.table)
    concepts = table_concepts(table)
    pairs = Path(arguments.stimuli).suffix == ".parquet"
    if pairs:
        items = ItemTable(pair_items(arguments.stimuli, concepts, root=arguments.images), len(concepts))
    else:
        items = ItemTable(text_items(arguments.stimuli, concepts), len(concepts))
    family = arguments.model or (None if arguments.checkpoint else "internvl")
    checkpoint = resolve_checkpoint(family, arguments.checkpoint)
    plan = HarvestPlan(
        concepts,
        items,
        blocks,
        arguments.output,
        model_identity(checkpoint),
        position=arguments.position,
        batch_tokens=arguments.batch_tokens,
        max_tokens=arguments.max_tokens,
        prompt=arguments.prompt or PROMPT,
        max_tiles=arguments.max_tiles,
        concepts_per_shard=arguments.concepts_per_shard,
        activations=arguments.activations,
    )
    load = partial(_load, str(checkpoint.path), arguments.device, arguments.precision, pairs)
    began = time.monotonic()
    if arguments.ray:
        from daco_rt.dictionary.distributed import harvest_on_ray

        means = harvest_on_ray(
            load,
            plan,
            workers=arguments.workers,
            cpus=arguments.cpus,
            gpus=arguments.gpus,
            overwrite=arguments.force,
        )
    else:
        means = plan.run(*load(), overwrite=arguments.force)
    found = summary(means)
    found |= {"checkpoint": checkpoint.label, "seconds": round(time.monotonic() - began, 1)}
    if arguments.json:
        print_json(found)
    else:
        _print(found)
    return 0


def _load(path: str, device: str, precision: str, pictures: bool) -> tuple[Any, Any]:
    """Return model and processor; a function of its own, since Ray's workers call it too."""
    from daco_rt.models.loading import load_torch
    from daco_rt.runtime.processor import Processor

    model, tokenizer = load_torch(path, device, precision)
    return model, Processor(path) if pictures else tokenizer


def summary(means: ConceptMeans) -> dict[str, Any]:
    """Return what a folder of means holds, in numbers."""
    rows = []
    for block in means.blocks:
        count = means.count(block)
        rows.append(
            {
                "block": block,
                "concepts": int((count > 0).sum()),
                "readings": int(count.sum()),
                "rejected": means.rejected(block),
                "median_norm": round(means.median_norm[block], 2),
            }
        )
    return {
        "path": str(means.path),
        "position": means.position,
        "stimuli": means.stimuli,
        "shards": means.shards.count,
        "blocks": rows,
        "skipped": means.skipped,
        "problems": means.problems,
    }


def _print(found: dict[str, Any]) -> None:
    titles = ("block", "concepts", "readings", "rejected", "median norm")
    print_table(titles, found["blocks"], ("block", "concepts", "readings", "rejected", "median_norm"))
    for reason, number in found["skipped"].items():
        print(f"not read: {number} × {reason}")
    for row in found["problems"][:10]:
        print(f"unusable: stimulus {row['id']} of concept {row['concept']}: {row['reason']}")
    print(
        f"wrote {found['path']}: {found['stimuli']} stimuli read at '{found['position']}' by "
        f"{found['checkpoint']} in {found['seconds']} s"
    )
