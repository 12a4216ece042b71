"""Batches of both stages, drawn from a seed of their step, so that a run that goes on sees the same ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scene_training import normalise

from daco_rt.scenes import Scenes, compose, draw_scenes, scene_concepts
from smol_vision.pictures import CAPTIONS, Gallery, place
from smol_vision.sight import GROUND
from smol_vision.talk import SYSTEMS, Row, Text, talk

BLOCK = 4
"""Steps whose rows are drawn together and sorted by length, so that a batch has little padding."""
_WORDS = 0.1
_COVERED = 0.2


class Stage(NamedTuple):
    """A stage of training: scenes and pictures a step, questions about each, and the learning rate."""

    name: str
    steps: int
    scenes: int
    pictures: int
    questions: int
    rate: float


class Batches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """The steps of a stage from ``first`` on, as tensors by name for `look_losses` or `answer_loss`."""

    def __init__(self, stage: Stage, first: int, seed: int, gallery: Gallery, folder: Path) -> None:
        self.stage, self.first, self.seed, self.gallery, self.folder = stage, first, seed, gallery, folder

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        if not self.stage.questions:
            for step in range(self.first, self.stage.steps):
                yield self._look(*self._seeds(step))
            return
        text = Text(self.folder)
        for block in range(self.first // BLOCK, -(-self.stage.steps // BLOCK)):
            for i, batch in enumerate(self._talk(text, *self._seeds(block))):
                if self.first <= block * BLOCK + i < self.stage.steps:
                    yield batch

    def _seeds(self, number: int) -> tuple[random.Random, torch.Generator]:
        key = random.Random(f"{self.seed}/{self.stage.name}/{number}")
        return key, torch.Generator().manual_seed(key.getrandbits(60))

    def _look(self, key: random.Random, generator: torch.Generator) -> dict[str, torch.Tensor]:
        stage, things = self.stage, self.gallery.things
        scenes = self._scenes(stage.scenes, generator)
        chosen = key.sample([i for i, thing in enumerate(things) if thing.pictures], stage.pictures)
        pixels, cover = self._pictures(chosen, key, generator)
        index = torch.cat([self.gallery.scene_things(), torch.tensor([len(things)])])
        # The lowest class of the four patches of a token: ground is the highest.
        under = scenes.patches.unflatten(1, (4, 2)).unflatten(3, (4, 2)).amin((2, 4)).flatten(1)
        covered = F.avg_pool2d(cover, 16).flatten(1) > _COVERED
        alone = torch.where(covered, torch.tensor(chosen)[:, None], len(things))
        return {
            "pixels": normalise(torch.cat([scenes.pixels, pixels])),
            "patches": scenes.patches,
            "things": torch.tensor(chosen),
            "captions": torch.randint(CAPTIONS, (len(things),), generator=generator),
            "tokens": torch.cat([index[under], alone]),
        }

    def _talk(
        self, text: Text, key: random.Random, generator: torch.Generator
    ) -> Iterator[dict[str, torch.Tensor]]:
        stage, things = self.stage, self.gallery.things
        scenes = self._scenes(BLOCK * stage.scenes, generator)
        spoken = [i for i, thing in enumerate(things) if thing.phrase and thing.pictures]
        chosen = key.sample(spoken, BLOCK * stage.pictures)
        pixels = torch.cat([scenes.pixels, self._pictures(chosen, key, generator)[0]])
        phrases = [str(things[i].phrase) for i in spoken]
        known = [concept.phrase for concept in scene_concepts()]
        rows: list[Row] = []
        for i in range(len(pixels)):
            if i < len(scenes.pixels):
                there, word, others = *content(scenes, i), known
            else:
                there, word, others = [str(things[chosen[i - len(scenes.pixels)]].phrase)], None, phrases
            system = SYSTEMS[0] if key.random() < 0.5 else key.choice(SYSTEMS[1:])
            rows.append(text.row(system, talk(there, word, others, stage.questions, key)))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        size = stage.scenes + stage.pictures
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        key.shuffle(parts)
        for part in parts:
            yield {"pixels": normalise(pixels[part]), **text.batch([rows[i] for i in part])}

    def _scenes(self, count: int, generator: torch.Generator) -> Scenes:
        counts = torch.randint(1, 4, (count,), generator=generator)
        return compose(draw_scenes(counts, generator, words=_WORDS), generator)

    def _pictures(
        self, chosen: list[int], key: random.Random, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        things = [self.gallery.things[i] for i in chosen]
        which = torch.tensor([key.choice(thing.pictures) for thing in things])
        handed = torch.tensor([thing.handed for thing in things])
        return place(self.gallery.pixels[which], handed, generator)


def content(scenes: Scenes, row: int) -> tuple[list[str], str | None]:
    """Return the phrases of what a scene holds from left to right, and the word in letters."""
    concepts, word = scene_concepts(), int(scenes.words[row])
    there = [concepts[i].phrase for i in scenes.concepts[row].tolist() if 0 <= i < GROUND]
    return there, concepts[word].name if word >= 0 else None
