"""Measure the concept dictionary of a built-in checkpoint.

    python scripts/build_concepts.py --model pocket-internvl --output python/daco_rt/data/pocket-concepts

It replaces an existing dictionary only with --force. The package's dictionary of smol-internvl is made by
``daco-rt build configs/smol-small.yaml``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

BLOCKS = {"smol-internvl": range(15, 20), "pocket-internvl": range(2, 5)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=sorted(BLOCKS), help="checkpoint to measure on")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--concepts", type=Path, help="another concept list (default: the built-in one)")
    parser.add_argument("--count", type=int, default=7, metavar="N", help="texts a concept (default 7)")
    parser.add_argument("--force", action="store_true", help="replace an existing dictionary")
    arguments = parser.parse_args()

    from daco_rt.artifacts import Concept
    from daco_rt.artifacts.store import check_target
    from daco_rt.concepts import everyday_concepts, make_stimuli, read_entries
    from daco_rt.dictionary import build_dictionary, harvest_means, text_items
    from daco_rt.errors import DacoError
    from daco_rt.models import model_identity, resolve_checkpoint
    from daco_rt.models.loading import load_torch

    try:
        check_target(arguments.output, overwrite=arguments.force)
        entries = everyday_concepts() if arguments.concepts is None else read_entries(arguments.concepts)
        concepts = tuple(
            Concept(i, entry.name, entry.label, entry.group, gloss=entry.gloss, source="built-in list")
            for i, entry in enumerate(entries)
        )
        checkpoint = resolve_checkpoint("internvl", arguments.model)
        model, tokenizer = load_torch(checkpoint.path)
        with tempfile.TemporaryDirectory() as folder:
            means = harvest_means(
                model,
                tokenizer,
                concepts,
                text_items(make_stimuli(entries, count=arguments.count).stimuli, concepts),
                list(BLOCKS[arguments.model]),
                Path(folder) / "means",
                identity=model_identity(checkpoint),
            )
            dictionary = build_dictionary(means, arguments.output, overwrite=arguments.force)
    except DacoError as error:
        print(f"build_concepts: error: {error}", file=sys.stderr)
        return 2
    blocks = ", ".join(map(str, dictionary.blocks))
    print(f"wrote {dictionary.path}: {dictionary.size} concepts at blocks {blocks}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
