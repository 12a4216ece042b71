"""The part of ``daco-rt stimuli`` that finds pairs of captions and pictures in a corpus."""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from daco_rt.console import print_json, print_table
from daco_rt.errors import DacoError

# Options of the group, by their names in the code: what is set without --corpus is refused.
_OPTIONS = (
    "images", "naming", "captions", "caption_column", "image_column", "id_column", "retriever", "embedder",
    "embeddings", "prompt", "gloss", "farthest", "seed", "sample", "copies", "device", "dtype", "batch",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of pairs in a group of their own."""
    group = parser.add_argument_group("pairs of a corpus")
    group.add_argument("--corpus", metavar="KIND:PLACE", help="cc3m, webdataset, parquet, folder or text")
    group.add_argument("--images", type=Path, metavar="DIR", help="cc3m, parquet: the folder of the pictures")
    group.add_argument(
        "--naming",
        metavar="RULE",
        help="cc3m: row (default), md5, sha1, sha256 of the address, or a mapping file",
    )
    group.add_argument("--captions", type=Path, metavar="FILE", help="folder: the captions file")
    group.add_argument("--caption-column", metavar="NAME", help="parquet: captions (default caption)")
    group.add_argument(
        "--image-column", metavar="NAME", help="parquet: bytes or paths (default image; '' for none)"
    )
    group.add_argument("--id-column", metavar="NAME", help="parquet: ids (default file and row)")
    group.add_argument(
        "--retriever",
        choices=("clip", "lexical"),
        help="joint distance (default), or captions that say the word",
    )
    group.add_argument(
        "--embedder", metavar="DIR_OR_ID", help="CLIP, SigLIP, or a sentence embedder for text alone"
    )
    group.add_argument(
        "--embeddings", type=Path, metavar="DIR", help="where they are kept (default OUTPUT.embeddings)"
    )
    group.add_argument(
        "--prompt", help="text of a concept (default 'a photo of {phrase}'; of text alone '{phrase}')"
    )
    group.add_argument("--gloss", action="store_true", default=None, help="append the definition to it")
    group.add_argument(
        "--farthest", type=float, metavar="DIST", help="leave out pairs of X+ farther than this"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the sample and of X- (default 0)")
    group.add_argument("--sample", type=int, metavar="N", help="pairs that X- are drawn from (default 32768)")
    group.add_argument("--copies", type=int, metavar="N", help="near-duplicate captions allowed (default 1)")
    group.add_argument("--device", help="where the embedder and the comparison run (default cpu)")
    group.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="of the embedder (default fp32)")
    group.add_argument(
        "--batch", type=int, metavar="N", help="pairs in one pass of the embedder (default 64)"
    )


def given(arguments: argparse.Namespace) -> list[str]:
    """Return the options of pairs that were given."""
    return [f"--{name.replace('_', '-')}" for name in _OPTIONS if getattr(arguments, name) is not None]


def run(arguments: argparse.Namespace) -> int:
    """Write the pairs of one table."""
    from daco_rt._files import refuse_existing
    from daco_rt.concepts.table import load_table, shipped_table
    from daco_rt.corpus import save_pairs
    from daco_rt.corpus.arrow import arrow
    from daco_rt.corpus.open import open_corpus

    arrow()
    if arguments.output.suffix != ".parquet":
        raise DacoError(
            f"pairs are written as Parquet; give --output a name ending in .parquet, not {arguments.output}"
        )
    if not arguments.force:
        if arguments.output.exists():
            # What it was made from is left where a kill came between the two.
            shutil.rmtree(_work(arguments), ignore_errors=True)
        refuse_existing(arguments.output)
    corpus = open_corpus(
        arguments.corpus,
        images=arguments.images,
        naming=arguments.naming,
        captions=arguments.captions,
        caption=arguments.caption_column,
        image=arguments.image_column,
        id=arguments.id_column,
    )
    table = shipped_table() if arguments.table == "built-in" else load_table(arguments.table)
    if arguments.retriever == "lexical":
        found = _lexical(arguments, corpus, table)
    else:
        found = _clip(arguments, corpus, table)
    problems = arguments.output.with_suffix(".problems.jsonl")
    corpus.problems.save(problems)
    save_pairs(
        found.columns,
        arguments.output,
        root=corpus.root,
        corpus=corpus.describe(),
        settings=found.settings,
        overwrite=arguments.force,
    )
    shutil.rmtree(_work(arguments), ignore_errors=True)
    _report(arguments, found, corpus, problems)
    return 0


def _lexical(arguments: argparse.Namespace, corpus: Any, table: Any) -> Any:
    from daco_rt.corpus.lexical import retrieve_lexical

    unused = ("embedder", "embeddings", "prompt", "gloss", "farthest", "device", "dtype", "batch")
    for name in unused:
        if getattr(arguments, name) is not None:
            raise DacoError(f"--{name} is of the clip retriever; leave it out with --retriever lexical")
    return retrieve_lexical(corpus, table, **_numbers(arguments))


def _clip(arguments: argparse.Namespace, corpus: Any, table: Any) -> Any:
    from daco_rt.corpus.embed import embed_corpus
    from daco_rt.corpus.encoders import load_encoder
    from daco_rt.corpus.retrieve import concept_prompts, retrieve_pairs
    from daco_rt.corpus.search import SearchPlan

    if arguments.embedder is None:
        raise DacoError(
            "give --embedder DIR_OR_ID (CLIP, SigLIP or a sentence embedder), or --retriever lexical"
        )
    if arguments.prompt is not None:
        concept_prompts(table[:1], arguments.prompt)  # before the corpus is embedded for hours
    device = arguments.device or "cpu"
    encoder = load_encoder(arguments.embedder, device=device, dtype=arguments.dtype or "fp32")
    if corpus.has_images and not encoder.has_images:
        raise DacoError(
            f"{arguments.embedder} embeds texts only and the corpus has pictures; give a CLIP or SigLIP "
            "model, or "
            "the captions alone as text:FILE"
        )
    folder = arguments.embeddings or arguments.output.with_suffix(".embeddings")
    store = embed_corpus(corpus, encoder, folder, batch=64 if arguments.batch is None else arguments.batch)
    corpus.problems = store.problems()
    options = {
        name: getattr(arguments, name)
        for name in ("prompt", "gloss", "farthest")
        if getattr(arguments, name) is not None
    }
    return retrieve_pairs(
        store,
        table,
        encoder,
        plan=SearchPlan(device=device),
        work=_work(arguments),
        **options,
        **_numbers(arguments),
    )


def _numbers(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("count", "minimum", "seed", "sample", "copies")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _work(arguments: argparse.Namespace) -> Path:
    return arguments.output.with_suffix(".retrieval")


def _report(arguments: argparse.Namespace, found: Any, corpus: Any, problems: Path) -> None:
    from daco_rt.cli.stimuli import print_left_out

    counts = Counter(positive for positive, _ in found.counts.values())
    pairs = len(found.columns["pair"])
    if arguments.json:
        print_json(
            {
                "file": str(arguments.output),
                "pairs": pairs,
                "distinct_pairs": len(set(found.columns["pair"])),
                "concepts": len(found.counts),
                "concepts_by_positive_pairs": dict(sorted(counts.items())),
                "excluded": found.excluded,
                "skipped": dict(sorted(found.skipped.items())),
                "problems": dict(sorted(corpus.problems.counts.items())),
                "problems_file": str(problems),
            }
        )
        return
    rows = [{"pairs": number, "concepts": concepts} for number, concepts in sorted(counts.items())]
    print_table(("pairs of X+ a concept", "concepts"), rows, ("pairs", "concepts"))
    for reason, number in sorted(found.skipped.items()):
        print(f"not used: {number} × {reason}")
    for problem, number in sorted(corpus.problems.counts.items()):
        print(f"skipped: {number} × {problem} (see {problems})")
    print_left_out(found.excluded, arguments.minimum, "pairs")
    print(f"wrote {arguments.output}: {pairs} pairs of {len(found.counts)} concepts")
