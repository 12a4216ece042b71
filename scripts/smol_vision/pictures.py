"""The registries' pictures as things with names: which are for training, and how one is placed in a frame."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from daco_rt.errors import ArtifactError
from daco_rt.progress import progress
from daco_rt.scenes import scene_concepts
from smol_vision.naming import clip_name, emoji_phrase, is_drawn_thing, known_nouns, with_article

SIDE = 64
CAPTIONS = 3
"""Captions a thing, of which a step of training takes one."""
HELD_OUT = 0.1
"""Share of emoji whose picture in the second style is kept for the examination."""
FETCH = "bash scripts/fetch_pictures.sh"
# Titles of collections are no names of what is in the picture.
_MOST_OF_A_TITLE = 12
# Turned round, they would show something else.
_HANDED = re.compile(
    r"\b(?:left|right|flag|arrow|o’clock|clockwise|button|symbol|sign|map|letters|text)", re.I
)


@dataclass
class Thing:
    """What a name stands for.

    Attributes
    ----------
    name : without an article: "dog".
    phrase : as in a sentence, "a dog"; None for what is not talked about.
    captions : `CAPTIONS` texts for the embedder.
    pictures : indices of the pictures to train with.
    held : indices of pictures that are never trained with.
    """

    name: str
    phrase: str | None
    captions: tuple[str, ...]
    pictures: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    @property
    def handed(self) -> bool:
        """Whether it must not be mirrored."""
        return _HANDED.search(self.name) is not None


@dataclass
class Gallery:
    """Things and the pictures of all of them: uint8 [n, 4, 64, 64], red, green, blue, opacity."""

    things: list[Thing]
    pixels: torch.Tensor

    def scene_things(self) -> torch.Tensor:
        """Index of the thing that each concept of the scenes is: int64 [concepts]."""
        index = {thing.name: i for i, thing in enumerate(self.things)}
        return torch.tensor([index[concept.name] for concept in scene_concepts()])


def load_gallery(folder: Path, cache: Path) -> Gallery:
    """Read emoji of both styles and clip art below ``folder``; the scaled pictures are kept in ``cache``.

    Raises
    ------
    ArtifactError
        A folder or a picture of it is missing.
    """
    things: dict[str, Thing] = {}
    files: list[Path] = []
    spoken = {concept.emoji: concept.name for concept in scene_concepts()}
    for maker in ("google", "twitter"):
        for row in read_rows(folder / f"emoji-{maker}"):
            label = row["label"]
            name = spoken.get(label, label)
            phrase = with_article(name) if label in spoken else emoji_phrase(label, row["subgroup"])
            about = f"{label}: {', '.join(row['tags'])}" if row["tags"] else label
            thing = things.setdefault(
                name, Thing(name, phrase, (name, f"a picture of {phrase or name}", about))
            )
            held = maker == "twitter" and label not in spoken and held_out(label)
            (thing.held if held else thing.pictures).append(len(files))
            files.append(folder / f"emoji-{maker}" / row["image"])
    nouns = known_nouns() | {word for name in things for word in name.split() if word.isalpha()}
    rows = [row for row in read_rows(folder / "openclipart") if is_drawn_thing(row["caption"])]
    titles = Counter(row["title"] for row in rows)
    for row in rows:
        title = row["title"] if titles[row["title"]] <= _MOST_OF_A_TITLE else ""
        clip = clip_name(title, Path(row["image"]).stem, nouns)
        if clip is None:
            continue
        phrase = with_article(clip)
        thing = things.setdefault(clip, Thing(clip, phrase, (clip, f"a picture of {phrase}", row["caption"])))
        thing.pictures.append(len(files))
        files.append(folder / "openclipart" / row["image"])
    return Gallery(list(things.values()), read_pictures(files, cache))


def held_out(label: str) -> bool:
    """Whether the second style of this emoji is for the examination: depends on the label alone."""
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big") / 2**32 < HELD_OUT


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``captions.jsonl`` in a folder of pictures."""
    try:
        lines = (folder / "captions.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}/captions.jsonl cannot be read ({error}); run {FETCH}") from error


def read_pictures(files: list[Path], cache: Path | None = None) -> torch.Tensor:
    """Return pictures scaled to fit 64 × 64 and centred: uint8 [n, 4, 64, 64]."""
    key = hashlib.sha256("\0".join("/".join(file.parts[-3:]) for file in files).encode()).hexdigest()
    if cache is not None and cache.is_file():
        with safe_open(str(cache), framework="pt") as file:
            if file.metadata().get("files") == key:
                return file.get_tensor("pixels")
    pixels = torch.empty(len(files), 4, SIDE, SIDE, dtype=torch.uint8)
    with progress("reading pictures", len(files), unit="pictures") as advance:
        for i, path in enumerate(files):
            pixels[i] = _read(path)
            advance(1)
    if cache is not None:
        save_file({"pixels": pixels}, cache, {"files": key})
    return pixels


def _read(path: Path) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGBA")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error}); run {FETCH}") from error
    # Colours under full transparency must not bleed into what is scaled down.
    picture = picture.convert("RGBa")
    scale = SIDE / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    picture = picture.resize(
        (size[0], size[1]), Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BILINEAR
    )
    frame = Image.new("RGBa", (SIDE, SIDE))
    frame.paste(picture, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return torch.from_numpy(np.array(frame.convert("RGBA"))).permute(2, 0, 1)


def place(
    pictures: torch.Tensor, handed: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Place one picture in each frame, differing in size, place, turn, mirroring, colour and ground.

    Parameters
    ----------
    pictures : uint8 [n, 4, 64, 64].
    handed : bool [n]: not to be mirrored.
    generator : source of all randomness.

    Returns
    -------
    pixels : fp32 [n, 3, 64, 64] within 0 and 1.
    cover : fp32 [n, 64, 64]: the pictures' opacity.
    """
    count = len(pictures)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator)

    size = 0.55 + 0.45 * uniform()
    angle = (uniform() - 0.5) * 0.4
    mirror = torch.where((uniform() < 0.5) & ~handed, -1.0, 1.0)
    x, y = ((uniform(2) * 2 - 1) * (1 - size + 0.1)[:, None]).unbind(-1)
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    rows = [[cos * mirror, -sin * mirror, -(cos * x - sin * y) * mirror], [sin, cos, -(sin * x + cos * y)]]
    theta = torch.stack([torch.stack(row, -1) for row in rows], -2)
    grid = F.affine_grid(theta, [count, 4, SIDE, SIDE], align_corners=False)
    drawn = F.grid_sample(_premultiplied(pictures), grid, align_corners=False)
    tint = 1 + (uniform(3, 1, 1) - 0.5) * 0.3
    pixels = drawn[:, :3] * tint + _ground(uniform) * (1 - drawn[:, 3:])
    pixels = pixels * (1 + (uniform(1, 1, 1) - 0.5) * 0.3)
    noise = 0.02 * torch.randn(pixels.shape, generator=generator)
    return (pixels + noise).clamp(0, 1), drawn[:, 3]


def on_white(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures as they are, on white ground: fp32 [n, 3, 64, 64] within 0 and 1."""
    layers = _premultiplied(pictures)
    return layers[:, :3] + 1 - layers[:, 3:]


def _premultiplied(pictures: torch.Tensor) -> torch.Tensor:
    layers = pictures.float() / 255
    return torch.cat([layers[:, :3] * layers[:, 3:], layers[:, 3:]], 1)


def _ground(uniform: Any) -> torch.Tensor:
    """White, black, or a colour with a gradient each way: [n, 3, 64, 64]."""
    ramp = torch.linspace(-0.5, 0.5, SIDE)
    slopes = (uniform(3, 2) - 0.5) * 0.4
    colour = (
        uniform(3)[:, :, None, None] + slopes[..., :1, None] * ramp[:, None] + slopes[..., 1:, None] * ramp
    )
    kind = uniform(1, 1, 1)
    return torch.where(
        kind < 0.4, torch.ones_like(colour), torch.where(kind < 0.5, torch.zeros_like(colour), colour)
    )
