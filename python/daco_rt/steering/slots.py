"""From the arguments of a model's forward pass to the slot of every token in it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from daco_rt.errors import PolicyError, UnsupportedError
from daco_rt.runtime.policies import Chosen
from daco_rt.runtime.positions import token_slots
from daco_rt.steering.host import to_numpy


class SlotTracker:
    """Knows, during each forward pass, which token of which row runs under which slot.

    The first pass over an empty cache is the prompt, everything later is decoded. Where no cache is used,
    a pass that repeats the tokens of the last one and adds to them continues it.

    Parameters
    ----------
    model : the model whose ``forward`` is watched.
    chosen : one policy for every row, or one policy a row.
    image_token : id of the image token, or None for a text model.
    """

    def __init__(
        self, model: torch.nn.Module, chosen: Chosen | Sequence[Chosen], image_token: int | None
    ) -> None:
        self._signature = inspect.signature(model.forward)
        self._chosen = chosen
        self._image_token = image_token
        self._planned: NDArray[np.int32] | None = None
        self._prompt: NDArray[np.int64] | None = None
        self._uncached: NDArray[np.int64] | None = None
        self.current: NDArray[np.int32] | None = None
        """int32 [B, S] during a forward pass, None outside."""

    def plan(self, slots: NDArray[np.int32] | None) -> None:
        """Use these slots for every pass from now on; None returns to the policy's positions."""
        self._planned = slots

    def before(self, _module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model."""
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        # Arguments that forward only passes on are collected under **kwargs.
        bound = {**bound, **bound.get("kwargs", {})}
        ids = bound.get("input_ids")
        tokens = bound.get("inputs_embeds") if ids is None else ids
        if tokens is None:
            raise UnsupportedError(
                "steer: the model was called without input_ids or inputs_embeds, so its tokens are unknown"
            )
        shape = (int(tokens.shape[0]), int(tokens.shape[1]))
        if self._planned is not None:
            if self._planned.shape != shape:
                raise PolicyError(
                    f"set_slots was given shape {list(self._planned.shape)}, this forward pass has tokens "
                    f"{list(shape)}; set others, or set_slots(None)"
                )
            self.current = self._planned
            return
        self.current = self._slots(bound, None if ids is None else to_numpy(ids), shape)

    def after(self, *_: Any) -> None:
        """Forward hook of the model, also run after an error."""
        self.current = None

    def _slots(self, bound: dict[str, Any], ids: NDArray | None, shape: tuple[int, int]) -> NDArray[np.int32]:
        batch, width = shape
        chosen = self._rows(batch)
        past = _cached(bound.get("past_key_values"))
        real, past_lengths = _real(bound.get("attention_mask"), past, batch, width)
        image = None
        if self._image_token is not None and ids is not None:
            image = ids == self._image_token
        elif self._image_token is not None and past == 0:
            rule = next((one.positions for one in chosen if one.positions in ("image", "text")), None)
            if rule is not None:
                raise PolicyError(
                    f"positions '{rule}' need input_ids to find image tokens, the model was called with "
                    "inputs_embeds only; pass input_ids or use set_slots"
                )
        if past == 0 and not self._continues(ids):
            self._prompt = real.sum(axis=1)
        elif self._prompt is None or len(self._prompt) != batch:
            self._prompt = past_lengths  # a cache from before steering began: all of it was prompt
        self._uncached = ids if past == 0 else None
        return token_slots(
            [one.slot for one in chosen],
            [one.positions for one in chosen],
            real,
            image_mask=image,
            prompt_lengths=self._prompt,
            past_lengths=past_lengths,
        )

    def _rows(self, batch: int) -> Sequence[Chosen]:
        if isinstance(self._chosen, Chosen):
            return [self._chosen] * batch
        if len(self._chosen) != batch:
            raise PolicyError(
                f"steer was given {len(self._chosen)} policies, the batch has {batch} rows; give one policy, "
                "or one a row (beams and repeated samples count as rows)"
            )
        return self._chosen

    def _continues(self, ids: NDArray | None) -> bool:
        last = self._uncached
        if last is None or ids is None or self._prompt is None or len(last) != len(ids):
            return False
        return ids.shape[1] > last.shape[1] and np.array_equal(ids[:, : last.shape[1]], last)


def _cached(cache: Any) -> int:
    """Tokens that a key/value cache holds."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    raise UnsupportedError(
        f"steer: past_key_values of type {type(cache).__name__} is not supported; pass a transformers Cache"
    )


def _real(mask: Any, past: int, batch: int, width: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(which tokens of this pass are no padding [B, S], how many such tokens the cache holds [B])."""
    if mask is None:
        return np.ones((batch, width), bool), np.full(batch, past, np.int64)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        kind = f"{mask.dim()} axes" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"steer: attention_mask must be [batch, tokens], got {kind} (a static cache makes such "
            "masks); use the default cache, or say which tokens to steer with set_slots"
        )
    table = to_numpy(mask).astype(bool)
    if len(table) != batch or table.shape[1] < past + width:
        raise PolicyError(
            f"steer: attention_mask must cover {batch} rows and the {past} cached and {width} new tokens, "
            f"got shape {list(table.shape)}"
        )
    return table[:, past : past + width], table[:, :past].sum(axis=1)
