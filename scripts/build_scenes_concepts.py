"""Measure the dictionary of scenes-internvl, and the rows that its SAEs are trained on.

    python scripts/build_scenes_concepts.py --output python/daco_rt/data/scenes-concepts
    python scripts/build_scenes_concepts.py --output dictionary --rows activations
    python scripts/build_scenes_concepts.py --output dictionary --rows activations --every-token

The model reads true descriptions of scenes that training might have shown. At the token before a thing's
name, where it is about to say it, the stream is averaged by thing: that is the concept's direction, less the
mean of all. The 101st concept is "thing", read where the system prompt makes the model call something so; it
is the one desirable concept. The stream's mean over all such places is what steering centres on, the norms
are those of the answers' tokens. A minute on two cores.

The rows are those of the same places, unless --every-token asks for all of the answers. Between the mean
before a name and the mean of all tokens lies a long direction, "a name is next", which the dictionary's
directions do not hold. An SAE trained on all tokens has to code it, does so with the concepts' latents, and
takes it out with them when it steers.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from daco_rt.artifacts import Concept, save_dictionary
from daco_rt.artifacts.store import check_target
from daco_rt.errors import DacoError
from daco_rt.models import model_identity, resolve_checkpoint
from daco_rt.models.loading import load_torch
from daco_rt.runtime.processor import Processor
from daco_rt.sae import create_store
from daco_rt.scenes import SAFELY, compose, describe, draw_scenes, scene_concepts
from daco_rt.scenes.language import DESCRIBE, NEUTRAL

BLOCKS = range(6)
BATCH = 50
SAFE = 0.25
"""Share of the scenes that are described safely."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the dictionary")
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="DIR",
        help="also fill this store with the stream before names, for daco-rt sae",
    )
    parser.add_argument("--every-token", action="store_true", help="fill it with the stream at every token")
    parser.add_argument("--checkpoint", default="scenes-internvl", help="model to read")
    parser.add_argument("--scenes", type=int, default=4000, metavar="N", help="scenes to read (default 4000)")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--force", action="store_true", help="replace an existing dictionary")
    arguments = parser.parse_args()
    try:
        check_target(arguments.output, overwrite=arguments.force)
        checkpoint = resolve_checkpoint("internvl", arguments.checkpoint)
        reader = Reader(checkpoint.path)
        build(reader, model_identity(checkpoint), arguments)
    except DacoError as error:
        print(f"build_scenes_concepts: error: {error}", file=sys.stderr)
        return 2
    return 0


class Reader:
    """Runs described scenes through the model and gives the stream at the tokens of their descriptions."""

    def __init__(self, checkpoint: Path) -> None:
        self.model, _ = load_torch(checkpoint)
        self.processor = Processor(checkpoint)
        self.names = {self._token(c.name): c.index for c in scene_concepts()}
        self.names[self._token(NEUTRAL)] = len(scene_concepts())

    def _token(self, name: str) -> int:
        [token] = self.processor.tokens(f" {name}")[0]
        return int(token)

    @torch.no_grad()
    def read(self, scenes: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (stream, concepts) of one scene after the other: [blocks, tokens, d] at the tokens from which
        the description was said, and what each was about to say, −1 for no concept."""
        generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
        for start in range(0, scenes, BATCH):
            count = min(BATCH, scenes - start)
            counts = torch.randint(1, 4, (count,), generator=generator)
            drawn = compose(draw_scenes(counts, generator, unsafe=0.25), generator)
            rows, pixels, lengths = [], [], []
            for i in range(count):
                shown = [scene_concepts()[k] for k in drawn.concepts[i].tolist() if k >= 0]
                safely, opening = draw.random() < SAFE, draw.randrange(len(DESCRIBE))
                prompt = self._prompt(SAFELY if safely else "", DESCRIBE[opening])
                said = describe(shown, None, opening=opening, safely=safely)
                made = self.processor.prepare(prompt + said, [picture(drawn.pixels[i])], raw=True)
                rows.append(made.input_ids.tolist())
                pixels.append(torch.from_numpy(made.pixel_values))
                lengths.append(len(self.processor.tokens(said)[0]))
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            out = self.model(input_ids=ids, pixel_values=torch.cat(pixels), output_hidden_states=True)
            stream = torch.stack([out.hidden_states[block + 1] for block in BLOCKS]).float().numpy()
            for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                # A token is said from the place before it.
                said_at = slice(len(row) - length - 1, len(row) - 1)
                about = np.array([self.names.get(token, -1) for token in row[-length:]])
                yield stream[:, i, said_at], about

    def _prompt(self, system: str, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        before: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        return self.processor.render([*before, {"role": "user", "content": content}])


def picture(pixels: torch.Tensor) -> Any:
    """Pixels [3, h, w] within 0 and 1 as an image of 8 bits."""
    from PIL import Image

    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def build(reader: Reader, identity: Any, arguments: argparse.Namespace) -> None:
    """Write the dictionary and, if asked, the store."""
    found = list(reader.read(arguments.scenes, arguments.seed))
    stream = np.concatenate([rows for rows, _ in found], axis=1)
    about = np.concatenate([names for _, names in found])
    size = len(scene_concepts()) + 1
    counts = np.bincount(about[about >= 0], minlength=size)
    if counts.min() < 10:
        raise DacoError(f"a concept was read {counts.min()} times only; give more --scenes")
    means = np.stack([stream[:, about == i].mean(axis=1, dtype=np.float64) for i in range(size)], axis=1)
    centre = means.mean(axis=1, keepdims=True)
    directions = means - centre
    norms = np.linalg.norm(directions, axis=-1, keepdims=True)
    medians = {block: float(np.median(np.linalg.norm(stream[block], axis=-1))) for block in BLOCKS}
    concepts = [
        Concept(c.index, c.name, c.label, c.group, gloss=f"the emoji “{c.emoji}”", source="scenes")
        for c in scene_concepts()
    ]
    concepts.append(
        Concept(size - 1, NEUTRAL, "desirable", "neutral", gloss="what is not named", source="scenes")
    )
    save_dictionary(
        arguments.output,
        model=identity,
        atoms={block: (directions / norms)[block].astype(np.float16) for block in BLOCKS},
        means={block: centre[block, 0].astype(np.float32) for block in BLOCKS},
        median_norm=medians,
        concepts=tuple(concepts),
        recipe={
            "direction": "mean of the readings less the mean of all concepts' means, unit norm",
            "position": "before-word",
            "script": "scripts/build_scenes_concepts.py",
            "scenes": arguments.scenes,
            "seed": arguments.seed,
            "readings": {"least": int(counts.min()), "median": int(np.median(counts))},
        },
        overwrite=arguments.force,
    )
    print(f"wrote {arguments.output}: {size} concepts at blocks {BLOCKS[0]} to {BLOCKS[-1]}")
    if arguments.rows is None:
        return
    parts = np.array_split(np.arange(len(found)), 16)
    store = create_store(
        arguments.rows,
        model=identity,
        blocks=list(BLOCKS),
        median_norm=medians,
        shards=len(parts),
        dtype="fp32",
        recipe={
            "script": "scripts/build_scenes_concepts.py",
            "scenes": arguments.scenes,
            "seed": arguments.seed,
        },
    )
    for shard in store.missing:
        members = parts[shard]
        tokens = [np.flatnonzero((found[i][1] >= 0) | arguments.every_token) for i in members]
        rows = np.concatenate([found[i][0][:, at] for i, at in zip(members, tokens, strict=True)], axis=1)
        texts = np.concatenate([np.full(len(t), i) for i, t in zip(members, tokens, strict=True)])
        # Counted from 1: a store has no rows of the first token.
        store.add(shard, dict(enumerate(rows)), text=texts, token=np.concatenate(tokens) + 1)
    print(f"wrote {arguments.rows}: {store.rows(BLOCKS[0])} rows a block")


if __name__ == "__main__":
    sys.exit(main())
