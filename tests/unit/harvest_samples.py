"""A small harvest for tests: eight concepts in short texts, the pocket model, and every reading by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from daco_rt.artifacts import Concept
from daco_rt.dictionary.harvest import harvest_means
from daco_rt.dictionary.items import HarvestItem
from daco_rt.dictionary.means import ConceptMeans

WORDS = ("dagger", "garden", "river", "violin", "whiskey", "old tree", "bread", "casino")
TEMPLATES = (
    "<|im_start|>Yesterday we talked about the {} for an hour.",
    "<|im_start|>user\nWhat is a {}?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>Here is the {}",
)
BLOCKS = (1, 3)


def concepts() -> tuple[Concept, ...]:
    return tuple(Concept(i, word, "undesirable" if i < 2 else "neutral") for i, word in enumerate(WORDS))


def items(counterexamples: bool = True) -> list[HarvestItem]:
    """Three texts a concept, and one of the next concept as a counterexample; in no order."""
    found = []
    for number, template in enumerate(TEMPLATES):
        for row, word in enumerate(WORDS):
            text = template.format(word)
            start = text.index(word)
            found.append(HarvestItem(row, 1, text, start, start + len(word), None, f"{word} {number}"))
            if counterexamples and number == 2:
                other = (row + 1) % len(WORDS)
                found.append(HarvestItem(other, -1, text, None, None, None, f"{word} {number}"))
    return found


@cache
def pocket(folder: Path) -> tuple[Any, Any, Any]:
    """Model, tokenizer and identity of the pocket model in a folder."""
    from daco_rt.models import model_identity, resolve_checkpoint
    from daco_rt.models.loading import load_torch

    model, tokenizer = load_torch(folder, "cpu")
    return model, tokenizer, model_identity(resolve_checkpoint("internvl", folder))


def harvest(folder: Path, output: Path, **changes: Any) -> ConceptMeans:
    model, tokenizer, identity = pocket(folder)
    options: dict[str, Any] = {
        "items": items(),
        "blocks": BLOCKS,
        "concepts_per_shard": 3,
        "batch_tokens": 64,
        "identity": identity,
        "progress": False,
    } | changes
    found, blocks = options.pop("items"), options.pop("blocks")
    return harvest_means(model, tokenizer, concepts(), found, blocks, output, **options)


def stream(folder: Path, text: str) -> tuple[dict[int, np.ndarray], list[tuple[int, int]]]:
    """The residual stream of one text alone by transformers' own output, fp64, and its tokens' characters."""
    model, tokenizer, _ = pocket(folder)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    with torch.no_grad():
        states = model(
            input_ids=torch.tensor([encoded["input_ids"]]), output_hidden_states=True
        ).hidden_states
    # hidden_states[0] are the embeddings, so block 2's output is number 3.
    return {b: states[b + 1][0].double().numpy() for b in BLOCKS}, encoded["offset_mapping"]


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
