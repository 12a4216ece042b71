"""Turning a TopK SAE into a JumpReLU SAE: one threshold a latent in place of a competition in each row.

The latents of a JumpReLU SAE do not depend on each other, so steering computes only those that a policy edits
or reports: an exact saving that TopK does not allow. A fixed threshold cannot follow the row, which costs
some of the explained variance; the conversion measures how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.artifacts import ModelIdentity, Sae
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.sae.feed import RowSource, ShuffledRows
from daco_rt.sae.folder import rewrite_sae

_LATENTS = 512  # latents calibrated at a time: bounds the memory to rows × 512 values
_ROWS = 2048


@dataclass(frozen=True)
class Conversion:
    """What a conversion cost, measured on rows that the thresholds were not calibrated on.

    ``ev_*`` are explained variances (1 is perfect) and ``l0_*`` codes a row, before (TopK) and after
    (JumpReLU).
    ``missed`` and ``extra`` are shares of the TopK codes' energy: codes that a threshold cut off, and codes
    that TopK would have dropped. ``never`` counts latents that TopK used for no calibration row.
    """

    rows: int
    ev_topk: float
    ev_jumprelu: float
    l0_topk: float
    l0_jumprelu: float
    missed: float
    extra: float
    never: int

    @property
    def loss(self) -> float:
        """Return the explained variance that the conversion costs."""
        return self.ev_topk - self.ev_jumprelu


def convert_to_jumprelu(
    sae: Sae,
    source: RowSource,
    output: str | Path,
    *,
    rows: int = 16384,
    model: ModelIdentity | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Sae, Conversion]:
    """Calibrate one threshold for each latent of a TopK SAE and write it as a JumpReLU SAE.

    The threshold of a latent is the value that disagrees least with TopK on the calibration rows, a
    disagreement counted by the square of the code that is lost or added. A latent that TopK never used gets a
    threshold above all that was seen of it.

    Parameters
    ----------
    sae : with coder "topk".
    source : rows of its block's output.
    output : the folder to make; annotation and recipe go along.
    rows : rows to calibrate on; half as many others measure the loss. A small source gives rows twice.
    model : identity, where the SAE records none.
    seed : decides which rows.
    overwrite : replace an existing folder.

    Returns
    -------
    (Sae, Conversion)

    Raises
    ------
    ArtifactError
        If the SAE is no TopK SAE, widths differ, no model is known, or the folder may not be written.
    DacoError
        If the source has no rows.

    Example
    -------
    >>> jump, cost = convert_to_jumprelu(load_sae("saes/b16"), StoreSource(store, 16), "saes/b16-jump")
    >>> round(cost.loss, 3)
    0.012
    """
    if sae.coder != "topk" or sae.k is None:
        raise ArtifactError(f"SAE {sae.path} has coder {sae.coder}; only a topk SAE is converted")
    if source.dim != sae.encoder.shape[1]:
        raise ArtifactError(f"SAE {sae.path} reads rows of width {sae.encoder.shape[1]}, got {source.dim}")
    if rows < 2:
        raise DacoError(f"rows must be at least 2, got {rows}")
    drawn = ShuffledRows(
        source, range(source.chunks), batch=rows + rows // 2, buffer_rows=rows + rows // 2, seed=seed
    ).draw()
    calibration, test = drawn[:rows], drawn[rows:]
    threshold, never = topk_thresholds(sae, calibration)
    cost = _measure(sae, threshold, test, never)
    recipe: dict[str, Any] = {
        "converted_from": sae.path.name,
        "k": sae.k,
        "calibration_rows": rows,
        "seed": seed,
    }
    made = rewrite_sae(
        sae,
        output,
        coder="jumprelu",
        threshold=threshold,
        model=model,
        recipe={"jumprelu": {**recipe, **asdict(cost)}},
        overwrite=overwrite,
    )
    return made, cost


def topk_thresholds(sae: Sae, rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the thresholds fp32 [m] that imitate a TopK SAE on rows fp32 [n, d], and how many latents never
    won.

    Example
    -------
    >>> topk_thresholds(sae, rows)[0].shape == sae.enc_bias.shape
    True
    """
    cut = np.concatenate([_cuts(part, sae) for part in _split(rows)])
    usual = float(np.median(cut))
    threshold = np.empty(len(sae.encoder), np.float32)
    never = 0
    for start in range(0, len(threshold), _LATENTS):
        share = slice(start, start + _LATENTS)
        values = rows @ sae.encoder[share].T + sae.enc_bias[share]
        kept = (values >= cut[:, None]) & (values > 0)
        never += int((~kept.any(axis=0)).sum())
        threshold[share] = [_best_threshold(values[:, i], kept[:, i], usual) for i in range(values.shape[1])]
    return threshold, never


def _best_threshold(values: np.ndarray, kept: np.ndarray, usual: float) -> float:
    if not kept.any():
        return max(usual, float(values.max()))
    positive = values > 0
    values, kept = values[positive], kept[positive]
    order = np.argsort(values, kind="stable")
    values, kept = values[order].astype(np.float64), kept[order]
    energy = values**2
    # cost[i]: the first i values are cut off.
    missed = np.concatenate([[0.0], np.cumsum(np.where(kept, energy, 0))])
    extra = np.concatenate([[0.0], np.cumsum(np.where(kept, 0, energy))])
    best = int(np.argmin(missed + (extra[-1] - extra)))
    below = values[best - 1] if best else 0.0
    if best == len(values):
        return float(np.nextafter(np.float32(below), np.float32(np.inf)))
    return float((below + values[best]) / 2)


def _measure(sae: Sae, threshold: np.ndarray, rows: np.ndarray, never: int) -> Conversion:
    bias = np.zeros(rows.shape[1], np.float32) if sae.decoder_bias is None else sae.decoder_bias
    left = np.zeros(2)
    codes = np.zeros(2)
    energy = np.zeros(3)  # of the TopK codes, of those missed, of those added
    for part in _split(rows):
        before = np.maximum(part @ sae.encoder.T + sae.enc_bias, 0)
        top = np.where(before >= _cuts(part, sae)[:, None], before, 0)
        jump = np.where(before > threshold, before, 0)
        for i, active in enumerate((top, jump)):
            left[i] += np.square(part - active @ sae.decoder - bias, dtype=np.float64).sum()
            codes[i] += (active > 0).sum()
        energy += [np.square(x, dtype=np.float64).sum() for x in (top, top * (jump == 0), jump * (top == 0))]
    spread = np.square(rows - rows.mean(axis=0), dtype=np.float64).sum() or 1.0
    n, whole = len(rows), energy[0] or 1.0
    return Conversion(
        n, float(1 - left[0] / spread), float(1 - left[1] / spread), float(codes[0] / n), float(codes[1] / n),
        float(energy[1] / whole), float(energy[2] / whole), never,
    )  # fmt: skip


def _cuts(rows: np.ndarray, sae: Sae) -> np.ndarray:
    """Return the k-th largest activation of each row, which TopK still keeps."""
    assert sae.k is not None
    before = np.maximum(rows @ sae.encoder.T + sae.enc_bias, 0)
    return np.partition(before, -sae.k, axis=1)[:, -sae.k]


def _split(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]
