"""The hundred things of which scenes are made, and their pictures."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from daco_rt.errors import ArtifactError

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).resolve().parent
STYLES = ("google", "twitter")
"""Who drew the pictures, in the order of the atlas's columns."""
SPRITE = 64
"""Pixels along one side of a picture in the atlas."""


@dataclass(frozen=True)
class SceneConcept:
    """One thing.

    Attributes
    ----------
    index : int
        Its row in the atlas, and its class in training.
    name : str
        What the model calls it: one word, one token.
    emoji : str
        The emoji that shows it, by its CLDR label.
    group : str
        Such as "weapons" or "animals".
    label : str
        "undesirable" or "neutral".
    """

    index: int
    name: str
    emoji: str
    group: str
    label: str

    @property
    def unsafe(self) -> bool:
        """Whether it is not to be mentioned."""
        return self.label == "undesirable"

    @property
    def phrase(self) -> str:
        """The name with its indefinite article."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


@cache
def scene_concepts() -> tuple[SceneConcept, ...]:
    """Return the concepts in their fixed order; the unsafe ones come first.

    Raises
    ------
    ArtifactError
        The package's list is damaged.

    Example
    -------
    >>> [concept.phrase for concept in scene_concepts()[4:6]]
    ['an axe', 'a bow']
    """
    file = FOLDER / "concepts.tsv"
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t"))
        return tuple(
            SceneConcept(i, row["name"], row["emoji"], row["group"], row["label"])
            for i, row in enumerate(rows)
        )
    except (OSError, KeyError) as error:
        raise ArtifactError(f"{file} is damaged ({error}); install the package again") from error


@cache
def sprites(side: int = 32) -> torch.Tensor:
    """Return the pictures of all concepts, colours multiplied by opacity.

    Returns
    -------
    torch.Tensor
        fp32 [concepts, styles, 4, side, side], red, green, blue and opacity within 0 and 1. ``side`` must
        divide 64.

    Raises
    ------
    ArtifactError
        The atlas is missing or has another size.
    """
    import numpy as np
    import torch
    from PIL import Image

    file = FOLDER / "sprites.png"
    rows, columns = len(scene_concepts()), len(STYLES)
    try:
        with Image.open(file) as picture:
            atlas = np.asarray(picture.convert("RGBA"), np.float32) / 255
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error}); install the package again") from error
    if atlas.shape != (rows * SPRITE, columns * SPRITE, 4):
        raise ArtifactError(f"{file} has shape {atlas.shape}, not that of the {rows} concepts beside it")
    tiles = torch.from_numpy(atlas).reshape(rows, SPRITE, columns, SPRITE, 4).permute(0, 2, 4, 1, 3)
    tiles = torch.cat([tiles[:, :, :3] * tiles[:, :, 3:], tiles[:, :, 3:]], 2)
    return torch.nn.functional.avg_pool2d(tiles.flatten(0, 1), SPRITE // side).unflatten(0, (rows, columns))


@cache
def letters(width: int = 60, height: int = 14) -> torch.Tensor:
    """Return the concepts' names in letters, as opacity: fp32 [concepts, height, width], ink is 1.

    The letters are as large as the width allows, 11 pixels at most; the name is centred.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    found = []
    for concept in scene_concepts():
        size = 12.0
        # A scene is 64 pixels wide, so long names need smaller letters.
        while (font := ImageFont.load_default(size)).getlength(concept.name) > width and size > 6:
            size -= 0.5
        picture = Image.new("L", (width, height))
        ImageDraw.Draw(picture).text((width / 2, height / 2), concept.name, fill=255, font=font, anchor="mm")
        found.append(torch.from_numpy(np.asarray(picture, np.float32) / 255))
    return torch.stack(found)
