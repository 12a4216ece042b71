"""Draws scenes: things of two styles at random places on coloured ground, all scenes of a batch at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from daco_rt.scenes.concepts import letters, scene_concepts, sprites
from daco_rt.scenes.draw import MOST, Choice

SIDE = 64
"""Pixels along one side of a scene."""
PATCH = 8
"""Pixels along one side of a patch of the vision tower, for `Scenes.patches`."""
# Least and largest size in pixels by the number of things, so that all find room.
_SIZES = ((22.0, 36.0), (21.0, 32.0), (20.0, 27.0))
_PLACES = 24
_WORD_ROW = 16


class Scenes(NamedTuple):
    """A batch of drawn scenes.

    Attributes
    ----------
    pixels : torch.Tensor
        fp32 [scenes, 3, 64, 64] within 0 and 1.
    concepts : torch.Tensor
        int64 [scenes, 3]: what is in each, from left to right; −1 where there are fewer.
    words : torch.Tensor
        int64 [scenes]: the concept written in letters, or −1.
    patches : torch.Tensor
        int64 [scenes, 8, 8]: the concept that covers most of a patch, if it covers a fifth of it; else the
        number of concepts, for ground.
    """

    pixels: torch.Tensor
    concepts: torch.Tensor
    words: torch.Tensor
    patches: torch.Tensor


def compose(choice: Choice, generator: torch.Generator) -> Scenes:
    """Place and draw what was chosen.

    Things differ in place, size (20 to 36 pixels), turn (up to 14°), mirroring and brightness; grounds in
    colour and gradient; everything gets a little noise. Cost: about half a millisecond a scene on one core.

    Parameters
    ----------
    choice : Choice
    generator : torch.Generator
        Source of all randomness.

    Returns
    -------
    Scenes

    Example
    -------
    >>> generator = torch.Generator().manual_seed(0)
    >>> compose(draw_scenes(torch.tensor([1, 3]), generator), generator).pixels.shape
    torch.Size([2, 3, 64, 64])
    """
    there = choice.concepts >= 0
    size, centre = _places(there, choice.words >= 0, generator)
    order = torch.where(there, centre[..., 0], torch.full_like(centre[..., 0], 1e3)).argsort(1)
    concepts, styles, size = (x.gather(1, order) for x in (choice.concepts, choice.styles, size))
    centre = centre.gather(1, order[..., None].expand(-1, -1, 2))
    there = concepts >= 0
    layers = _layers(concepts.clamp(min=0), styles, size, centre, generator) * there[:, :, None, None, None]
    pixels = _ground(len(concepts), generator)
    for i in range(MOST):
        pixels = pixels * (1 - layers[:, i, 3:]) + layers[:, i, :3]
    cover = layers[:, :, 3]
    pixels, written = _write(pixels, choice.words, generator)
    cover = torch.cat([cover, written[:, None]], 1)
    light = 1 + (_uniform((len(pixels), 1, 1, 1), generator) - 0.5) * 0.3
    shift = (_uniform((len(pixels), 1, 1, 1), generator) - 0.5) * 0.1
    noise = 0.02 * torch.randn(pixels.shape, generator=generator)
    pixels = (pixels * light + shift + noise).clamp(0, 1)
    shares, which = F.avg_pool2d(cover, PATCH).max(1)
    named = torch.cat([concepts, choice.words[:, None]], 1).gather(1, which.flatten(1)).view_as(which)
    patches = torch.where(shares > 0.2, named, torch.full_like(named, len(scene_concepts())))
    return Scenes(pixels, concepts, choice.words, patches)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator)


def _places(
    there: torch.Tensor, lettered: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes [scenes, 3] and centres [scenes, 3, 2] in pixels: the first of several draws without overlap in
    which things also stand clearly left and right of each other."""
    scenes = len(there)
    bounds = torch.tensor(_SIZES)[(there.sum(1) - 1).clamp(min=0)]
    size = bounds[:, :1] + (bounds[:, 1:] - bounds[:, :1]) * _uniform((scenes, MOST), generator)
    margin = 0.46 * size[:, None, :, None]
    room = torch.full((scenes, 1, 1, 2), float(SIDE))
    room[..., 1] -= _WORD_ROW * lettered[:, None, None]
    centre = margin + (room - 2 * margin) * _uniform((scenes, _PLACES, MOST, 2), generator)
    score = torch.full((scenes, _PLACES), 1e3)
    for i in range(MOST):
        for j in range(i):
            apart = (centre[:, :, i] - centre[:, :, j]).abs()
            needed = 0.475 * (size[:, i] + size[:, j])[:, None]
            free = torch.minimum(apart.amax(-1) - needed, apart[..., 0] - 6)
            both = (there[:, i] & there[:, j])[:, None]
            score = torch.where(both, torch.minimum(score, free), score)
    good = score >= 0
    first = torch.where(good.any(1), good.float().argmax(1), score.argmax(1))
    return size, centre[torch.arange(scenes), first]


def _layers(
    concepts: torch.Tensor,
    styles: torch.Tensor,
    size: torch.Tensor,
    centre: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Each thing on a canvas of its own: [scenes, 3, 4, 64, 64], colours multiplied by opacity."""
    scenes = len(concepts)
    angle = (_uniform((scenes, MOST), generator) - 0.5) * 0.5
    mirror = torch.where(_uniform((scenes, MOST), generator) < 0.5, -1.0, 1.0)
    scale = SIDE / size
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    x, y = (centre / SIDE * 2 - 1).unbind(-1)
    rows = [[cos * mirror, -sin * mirror, -(cos * x - sin * y) * mirror], [sin, cos, -(sin * x + cos * y)]]
    theta = torch.stack([torch.stack(row, -1) for row in rows], -2).flatten(0, 1)
    grid = F.affine_grid(theta, [len(theta), 4, SIDE, SIDE], align_corners=False)
    pictures = sprites()[concepts, styles].flatten(0, 1)
    drawn = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    layers = drawn.unflatten(0, (scenes, MOST))
    tint = 1 + (_uniform((scenes, MOST, 3, 1, 1), generator) - 0.5) * 0.3
    return torch.cat([layers[:, :, :3] * tint, layers[:, :, 3:]], 2)


def _ground(scenes: int, generator: torch.Generator) -> torch.Tensor:
    """Plain or bright colours with a gradient each way: [scenes, 3, 64, 64]."""
    colour = _uniform((scenes, 3), generator)
    bright = 0.75 + 0.25 * _uniform((scenes, 3), generator)
    colour = torch.where(_uniform((scenes, 1), generator) < 0.5, bright, colour)
    ramp = torch.linspace(-0.5, 0.5, SIDE)
    slopes = (_uniform((scenes, 3, 2), generator) - 0.5) * 0.4
    gradient = slopes[..., :1, None] * ramp[:, None] + slopes[..., 1:, None] * ramp
    return colour[:, :, None, None] + gradient


def _write(
    pixels: torch.Tensor, words: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write names near the lower edge, dark on a light plate; returns pixels and the plates' opacity."""
    written = torch.zeros(len(pixels), SIDE, SIDE)
    at = (words >= 0).nonzero().flatten()
    if not len(at):
        return pixels, written
    names = letters()[words[at]]
    height, width = names.shape[-2:]
    left = torch.randint(SIDE - width + 1, (len(at),), generator=generator)
    top = SIDE - height - torch.randint(3, (len(at),), generator=generator)
    ink = torch.zeros(len(at), SIDE, SIDE)
    plate = torch.zeros(len(at), SIDE, SIDE)
    for row in range(len(at)):
        place = (row, slice(top[row], top[row] + height), slice(left[row], left[row] + width))
        ink[place], plate[place] = names[row], 1.0
    paper = 0.8 + 0.2 * _uniform((len(at), 3, 1, 1), generator)
    colour = 0.35 * _uniform((len(at), 3, 1, 1), generator)
    page = paper * (1 - ink[:, None]) + colour * ink[:, None]
    pixels = pixels.clone()
    pixels[at] = pixels[at] * (1 - plate[:, None]) + page * plate[:, None]
    written[at] = plate
    return pixels, written
