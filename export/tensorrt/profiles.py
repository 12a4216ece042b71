"""Shapes that an engine is built for: one profile for prompts, one for single tokens, in one engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from daco_rt.artifacts.engine import TensorRTPlan

PREFILL, DECODE = 0, 1
"""Numbers of the decoder's profiles, in the order in which they are added."""


class Range(NamedTuple):
    """Smallest, likeliest and largest shape of one input."""

    low: tuple[int, ...]
    likely: tuple[int, ...]
    high: tuple[int, ...]


Profile = dict[str, Range]
Shapes = Mapping[str, tuple[int, ...]]
"""Input → shape, −1 where it is open."""


def decoder_profiles(inputs: Shapes, plan: TensorRTPlan) -> list[Profile]:
    """Return the prompt's profile and the single token's, over every input of the decoder graph.

    Parameters
    ----------
    inputs : the graph's inputs.
    plan : limits of batch, width and cache.

    Raises
    ------
    ValueError
        An input is unknown, or has an open axis where the graph fixes it.

    Example
    -------
    >>> plan = TensorRTPlan(256, 4, 64, 1, None)
    >>> decoder_profiles({"inputs_embeds": (-1, -1, 192)}, plan)[DECODE]["inputs_embeds"].high
    (4, 1, 192)
    """
    likely_rows = max(1, plan.max_batch // 2)
    likely_width = max(1, plan.max_width // 2)

    def over(name: str, shape: tuple[int, ...], low: int, likely: int, high: int) -> Range:
        return Range(
            _fill(name, shape, 1, low),
            _fill(name, shape, 1, likely),
            _fill(name, shape, plan.max_batch, high),
        )

    prefill = {name: over(name, shape, 1, likely_width, plan.max_width) for name, shape in inputs.items()}
    decode = {
        name: Range(
            _fill(name, shape, 1, 1),
            _fill(name, shape, likely_rows, 1),
            _fill(name, shape, plan.max_batch, 1),
        )
        for name, shape in inputs.items()
    }
    return [prefill, decode]


def vision_profiles(inputs: Shapes, plan: TensorRTPlan) -> list[Profile]:
    """Return the one profile of the vision tower: 1 to ``max_tiles`` tiles."""
    return [
        {
            name: Range((1, *shape[1:]), (1, *shape[1:]), (plan.max_tiles, *shape[1:]))
            for name, shape in inputs.items()
        }
    ]


def shape_options(profiles: Iterable[Profile]) -> list[str]:
    """The same shapes as options of ``trtexec``, in its order: each profile by its number, then three
    options."""
    options: list[str] = []
    for number, profile in enumerate(profiles):
        options.append(f"--profile={number}")
        for option, which in (("minShapes", 0), ("optShapes", 1), ("maxShapes", 2)):
            shapes = ",".join(f"{name}:{'x'.join(map(str, r[which]))}" for name, r in profile.items())
            options.append(f"--{option}={shapes}")
    return options


_AXES: dict[str, tuple[str | None, ...]] = {
    "inputs_embeds": ("rows", "width", None),
    "position_ids": (None, "rows", "width"),
    "policy_slots": ("rows", "width"),
    "write_indices": ("rows",),
    # One row of logits a request: the token that is chosen next.
    "logits_at": ("rows", "one"),
}


def _fill(name: str, shape: tuple[int, ...], rows: int, width: int) -> tuple[int, ...]:
    axes = ("rows", None, None, None) if name.startswith(("past_k.", "past_v.")) else _AXES.get(name)
    if axes is None or len(axes) != len(shape):
        raise ValueError(f"decoder_profiles: input {name} of shape {list(shape)} is not one of the decoder's")
    sizes = {"rows": rows, "width": width, "one": 1}
    filled = tuple(size if axis is None else sizes[axis] for axis, size in zip(axes, shape, strict=True))
    if min(filled) < 1:
        raise ValueError(f"decoder_profiles: input {name} of shape {list(shape)} leaves a fixed axis open")
    return filled
