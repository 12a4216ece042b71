"""Every hyper-parameter of a training, checked, and recorded in the artifact."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from daco_rt.errors import DacoError


@dataclass(frozen=True)
class SaeTraining:
    """How an SAE is trained.

    Parameters
    ----------
    sparsity : "topk" keeps the k largest codes of a row; "l1" puts a price on their sum.
    k : codes a row, with "topk".
    l1 : price of the sum of a row's codes as a fraction of the row's mean norm, against the fraction of
        variance that is left unexplained, with "l1".
    init : "dictionary" starts decoder rows at the concepts' atoms, "random" at random directions.
    hold : with init "dictionary", keep the decoder rows that start at atoms where they are; the encoder, the
        biases and the other rows are trained. A latent then writes its concept's direction and nothing else.
    latents : how many; by default as many as the dictionary has concepts. Those beyond it start at random.
    rescale : scale the encoder after initialisation so that it explains the most of the first rows. Without
        it coherent atoms over-count: each of them codes what they share.
    steps, batch : optimiser steps, and rows in each.
    lr, warmup, decay : peak learning rate; fractions of the steps in which it rises from and falls to 0.
    weight_decay, beta1, beta2, clip : of AdamW, and the norm at which gradients are clipped (0: not).
    aux : weight of the auxiliary loss, in which dead latents reconstruct what the others left; 0 is off.
    aux_k : dead latents that a row uses in it; by default half the width.
    dead_after : rows after which a latent that never fired counts as dead; by default 5 % of all rows, at
        least 20 batches.
    buffer_rows : rows shuffled together.
    holdout : chunks of the source (shards of a store) kept for evaluation; none if it has a single one.
    eval_rows : rows of them that are evaluated.
    precision : "auto" is bf16 autocast on CUDA and fp32 elsewhere; or "fp32", "bf16".
    log_every, checkpoint_every : steps between lines of metrics and between checkpoints.
    seed : decides initialisation and the order of rows.

    Raises
    ------
    DacoError
        If a value is out of range.

    Example
    -------
    >>> SaeTraining(k=64, steps=20_000, batch=4096).latents is None
    True
    """

    sparsity: Literal["topk", "l1"] = "topk"
    k: int = 32
    l1: float = 0.1
    init: Literal["dictionary", "random"] = "dictionary"
    hold: bool = False
    latents: int | None = None
    rescale: bool = True
    steps: int = 5000
    batch: int = 1024
    lr: float = 5e-4
    warmup: float = 0.05
    decay: float = 0.2
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    aux: float = 1 / 32
    aux_k: int | None = None
    dead_after: int | None = None
    buffer_rows: int = 1 << 18
    holdout: int = 1
    eval_rows: int = 8192
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    log_every: int = 20
    checkpoint_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("sparsity", ("topk", "l1")),
            ("init", ("dictionary", "random")),
            ("precision", ("auto", "fp32", "bf16")),
        ):
            if getattr(self, name) not in choices:
                raise DacoError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.hold and self.init != "dictionary":
            raise DacoError("hold keeps decoder rows at the dictionary's atoms; it needs init 'dictionary'")
        for name in ("k", "steps", "batch", "buffer_rows", "eval_rows", "log_every", "checkpoint_every"):
            self._at_least(name, 1)
        for name in ("latents", "aux_k", "dead_after"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        for name in ("holdout", "seed"):
            self._at_least(name, 0)
        for name in ("l1", "lr", "weight_decay", "clip", "aux"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise DacoError(f"{name} must be a number of at least 0, got {value!r}")
        for name in ("warmup", "decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise DacoError(f"{name} must be from 0 to below 1, got {getattr(self, name)!r}")
        if self.warmup + self.decay > 1:
            raise DacoError(
                f"warmup {self.warmup} and decay {self.decay} overlap; their sum must be at most 1"
            )

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < least:
            raise DacoError(f"{name} must be an integer of at least {least}, got {value!r}")

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rising, falling = self.warmup * self.steps, self.decay * self.steps
        up = (step + 1) / rising if rising >= 1 else 1.0
        down = (self.steps - step) / falling if falling >= 1 else 1.0
        return self.lr * min(1.0, up, down)

    def dead_rows(self) -> int:
        """Return ``dead_after`` in rows, the default resolved."""
        if self.dead_after is not None:
            return self.dead_after
        return max(20 * self.batch, self.steps * self.batch // 20)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = asdict(self)
        # Left out where it is not used, so that trainings from before it existed can be resumed.
        if not self.hold:
            del values["hold"]
        return values
