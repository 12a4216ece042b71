"""The examination: what the trained tower and the whole model make of pictures that training did not show."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scene_training import normalise

from daco_rt.scenes import Scenes, compose, draw_scenes, scene_concepts
from daco_rt.scenes.language import read_telling
from smol_vision.batches import content
from smol_vision.pictures import Gallery, on_white, read_pictures, read_rows
from smol_vision.sight import Sight
from smol_vision.talk import ASK, SYSTEM

AMONG = 100
"""Captions from which the right one is to be found."""
SEED = 20261130
_STAMP = re.compile(r"(?:an?|the|some) ([a-z][a-z -]+)\.", re.I)


class Exam:
    """Examines a model; every share comes with the number of pictures it rests on.

    Parameters
    ----------
    sight : the trained model.
    embed : texts to unit vectors, centred as in training: fp32 [n, embedded].
    number : pictures of a kind at most.
    """

    def __init__(self, sight: Sight, embed: Any, number: int) -> None:
        self.sight, self.embed, self.number = sight, embed, number

    def run(self, gallery: Gallery, folder: Path) -> dict[str, dict[str, float]]:
        """Return the shares for scenes, emoji, clip art and stamps."""
        found = {}
        for kind, side, count in (
            ("scenes of one, seen pairs", "train", 1),
            ("scenes of two, seen pairs", "train", 2),
            ("scenes of three, seen pairs", "train", 3),
            ("scenes of two, held-out pairs", "held-out", 2),
            ("scenes of three, held-out pairs", "held-out", 3),
        ):
            generator = torch.Generator().manual_seed(SEED + count)
            counts = torch.full((self.number // 2,), count)
            drawn = compose(draw_scenes(counts, generator, side=side), generator)  # type: ignore[arg-type]
            found[kind] = self._scenes(drawn)
        draw = random.Random(SEED)
        spoken = [thing for thing in gallery.things if thing.phrase]
        held = [(thing, i) for thing in spoken for i in thing.held]
        seen = [(thing, i) for thing in spoken for i in thing.pictures]
        for kind, pairs in (("pictures of training", seen), ("emoji in a style not seen", held)):
            some = draw.sample(pairs, min(self.number, len(pairs)))
            pixels = on_white(gallery.pixels[[i for _, i in some]])
            names = [thing.name for thing, _ in some]
            found[kind] = self._named(pixels, names, names)
        names, captions, pixels = stamps(folder / "tuxpaint", self.number)
        found["stamps of Tux Paint"] = self._named(pixels, names, captions)
        return found

    def _scenes(self, scenes: Scenes) -> dict[str, float]:
        told = self.sight.answer(normalise(scenes.pixels), ASK, system=SYSTEM)
        hits = total = named = exact = 0
        for row, text in enumerate(told):
            truth = {i for i in scenes.concepts[row].tolist() if i >= 0}
            telling = set(read_telling(text).concepts)
            phrases, _ = content(scenes, row)
            listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
            exact += text == f"The picture shows {listed}."
            hits, total, named = hits + len(truth & telling), total + len(truth), named + len(telling)
        return {
            "pictures": len(told),
            "recall": round(hits / max(1, total), 4),
            "precision": round(hits / max(1, named), 4),
            "exact": round(exact / max(1, len(told)), 4),
            "chance": round(1 / len(scene_concepts()), 4),
        }

    def _named(self, pixels: torch.Tensor, names: Sequence[str], captions: Sequence[str]) -> dict[str, float]:
        """Whether the answer holds the name, and whether tower and answer lead to the right caption of many.

        "other" is how often the answers hold the name of another picture: what guessing common things gives.
        """
        prepared = normalise(pixels)
        told = self.sight.answer(prepared, ASK, system=SYSTEM)
        with torch.no_grad():
            pooled = self.sight.heads.pooled(self.sight.see(prepared.to(self.sight.device))).cpu()
        wanted = self.embed(captions)
        turned = [*names[len(names) // 2 :], *names[: len(names) // 2]]
        return {
            "pictures": len(told),
            "named": share(holds(text, name) for text, name in zip(told, names, strict=True)),
            "other": share(holds(text, name) for text, name in zip(told, turned, strict=True)),
            "caption found by the tower": found_among(pooled, wanted, captions),
            "caption found by the answer": found_among(self.embed(told), wanted, captions),
            "chance": round(1 / min(AMONG, len(set(captions))), 4),
        }


def stamps(folder: Path, number: int) -> tuple[list[str], list[str], torch.Tensor]:
    """Return names, captions and pictures on white of Tux Paint's stamps whose caption is "A name."

    Of stamps with the same caption the first is taken.
    """
    rows: dict[str, dict[str, Any]] = {}
    for row in read_rows(folder):
        said = _STAMP.fullmatch(row["caption"])
        if said and len(said[1].split()) <= 3:
            rows.setdefault(said[1].lower(), row)
    names = random.Random(SEED).sample(sorted(rows), min(number, len(rows)))
    pixels = read_pictures([folder / rows[name]["image"] for name in names])
    return names, [rows[name]["caption"] for name in names], on_white(pixels)


def holds(text: str, name: str) -> bool:
    """Whether a text holds a name as whole words."""
    return re.search(rf"\b{re.escape(name.lower())}\b", text.lower()) is not None


def share(values: Any) -> float:
    """The share of what is true, rounded."""
    listed = [bool(value) for value in values]
    return round(sum(listed) / max(1, len(listed)), 4)


def found_among(given: torch.Tensor, wanted: torch.Tensor, captions: Sequence[str]) -> float:
    """Share of rows of ``given`` that are nearest to their own row of ``wanted`` among it and 99 others.

    The others are drawn from a fixed seed among those with another caption, fewer where there are fewer.
    """
    draw = random.Random(SEED)
    distinct = {caption: i for i, caption in reversed([*enumerate(captions)])}
    hits = []
    for i, caption in enumerate(captions):
        rest = [j for other, j in distinct.items() if other != caption]
        chosen = draw.sample(rest, min(AMONG - 1, len(rest)))
        hits.append(bool((given[i] @ wanted[chosen].T < given[i] @ wanted[i]).all()))
    return share(hits)
