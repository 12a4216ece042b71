"""The autoencoder while it is trained: initialisation, forward pass, losses, the unit decoder.

It works on centred, scaled rows x = scale·z, with ‖x − centre‖ about sqrt(d), so that one learning rate and
one price of sparsity suit every block of every model. The scale is divided out of the biases when it is
saved: a code of the saved SAE is in units of the residual stream, its decoder rows are the trained unit rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from daco_rt.errors import DacoError
from daco_rt.sae.settings import SaeTraining


class Losses(NamedTuple):
    """Of one batch: the sum that is minimised, its parts, and what is logged."""

    total: Tensor
    unexplained: Tensor  # fraction of the variance, 0 to 1 and above
    sparsity: Tensor
    auxiliary: Tensor
    codes: Tensor  # [B, m], detached


class Autoencoder(nn.Module):
    """Decoder rows of unit norm, an encoder of the same shape, two biases.

    Example
    -------
    >>> sae = Autoencoder(directions, centre, scale=0.1, training=SaeTraining())
    >>> sae.codes(sae.inputs(torch.randn(4, 576))).shape
    torch.Size([4, 320])
    """

    def __init__(
        self, directions: Tensor, centre: Tensor, scale: float, training: SaeTraining, *, held: int = 0
    ) -> None:
        super().__init__()
        self.decoder = nn.Parameter(directions / directions.norm(dim=1, keepdim=True))
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.encoder_bias = nn.Parameter(torch.zeros(len(directions), device=directions.device))
        self.decoder_bias = nn.Parameter(centre * scale)
        self.scale = scale
        self.settings = training
        self.held = held
        """The first rows of the decoder that are not trained."""

    def inputs(self, rows: Tensor) -> Tensor:
        """Return rows of the residual stream in the units of the training."""
        return rows * self.scale

    def preactivations(self, x: Tensor) -> Tensor:
        """Return fp32 [B, m] before any selection."""
        centred = x - self.decoder_bias
        return (centred @ self.encoder.T).float() + self.encoder_bias

    def select(self, before: Tensor) -> Tensor:
        """Return the codes: those above zero, and with "topk" the k largest of them."""
        positive = torch.relu(before)
        if self.settings.sparsity == "l1":
            return positive
        values, places = positive.topk(self.settings.k, dim=1, sorted=False)
        return torch.zeros_like(positive).scatter(1, places, values)

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of scaled rows, fp32 [B, m]."""
        return self.select(self.preactivations(x))

    def decode(self, codes: Tensor) -> Tensor:
        """Return what codes write, without the decoder's bias, fp32 [B, d]."""
        return (codes @ self.decoder).float()

    def losses(self, x: Tensor, dead: Tensor) -> Losses:
        """Return the losses of a batch; ``dead`` is a mask [m] of latents for the auxiliary loss."""
        before = self.preactivations(x)
        codes = self.select(before)
        left = x - self.decoder_bias - self.decode(codes)
        spread = (x - x.mean(dim=0)).square().sum()
        unexplained = left.square().sum() / spread
        sparsity = x.new_zeros(())
        if self.settings.sparsity == "l1":
            sparsity = self.settings.l1 * codes.sum(dim=1).mean() / x.shape[1] ** 0.5
        auxiliary = x.new_zeros(())
        count = int(dead.sum())
        if count and self.settings.aux > 0:
            auxiliary = self.settings.aux * self._auxiliary(before, left.detach(), dead, count)
        total = unexplained + sparsity + auxiliary
        return Losses(total, unexplained.detach(), sparsity.detach(), auxiliary.detach(), codes.detach())

    def _auxiliary(self, before: Tensor, left: Tensor, dead: Tensor, count: int) -> Tensor:
        """Return how badly the dead latents alone explain what the live ones left over; values end at 1."""
        k = min(count, self.settings.aux_k or max(1, left.shape[1] // 2))
        values, places = before.masked_fill(~dead, -torch.inf).topk(k, dim=1, sorted=False)
        codes = torch.zeros_like(before).scatter(1, places, torch.relu(values))
        made = self.decode(codes)
        # Together dead codes overshoot the residual by far. Left alone, the loss would only shrink them, and
        # what is small loses every competition; scaled to fit, they turn towards what is missing.
        fit = ((left * made).sum() / made.square().sum().clamp_min(1e-12)).detach().clamp_min(0.0)
        error = (left - fit * made).square().sum() / left.square().sum().clamp_min(1e-12)
        return error.nan_to_num(0.0)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Take out of the decoder's gradient what would only change rows' lengths, and all of held rows."""
        gradient = self.decoder.grad
        if gradient is not None:
            gradient.sub_((gradient * self.decoder).sum(dim=1, keepdim=True) * self.decoder)
            gradient[: self.held] = 0

    @torch.no_grad()
    def normalise(self) -> None:
        """Give the decoder's rows unit length again."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def fit_encoder_scale(self, x: Tensor) -> float:
        """Scale the encoder by the one factor that makes its codes explain the most of ``x``; return it."""
        centred = x - self.decoder_bias
        made = self.decode(self.codes(x))
        factor = float((centred * made).sum() / made.square().sum().clamp_min(1e-12))
        factor = factor if 0 < factor < np.inf else 1.0
        self.encoder.mul_(factor)
        return factor

    @torch.no_grad()
    def weights(self) -> dict[str, np.ndarray]:
        """Return the weights by SAELens's names, in units of the residual stream."""
        tables = {
            "W_enc": self.encoder.T,
            "b_enc": self.encoder_bias / self.scale,
            "W_dec": self.decoder,
            "b_dec": self.decoder_bias / self.scale,
        }
        return {name: np.ascontiguousarray(t.float().cpu().numpy()) for name, t in tables.items()}


def initial_directions(atoms: np.ndarray | None, dim: int, training: SaeTraining) -> Tensor:
    """Return unit rows [m, d] to start from: the atoms, random ones beyond them or in their place.

    Raises
    ------
    DacoError
        If the number of latents is not known or too small, an atom is zero, or the widths differ.
    """
    known = 0 if atoms is None else len(atoms)
    latents = training.latents or known
    if training.init == "dictionary" and atoms is None:
        raise DacoError("init 'dictionary' needs a concept dictionary; give one, or choose init 'random'")
    if not latents:
        raise DacoError("without a dictionary the number of latents is unknown; give latents")
    if training.sparsity == "topk" and training.k > latents:
        raise DacoError(f"k = {training.k} is larger than the {latents} latents; lower k")
    random = np.random.default_rng((training.seed, 1)).standard_normal((latents, dim))
    if training.init == "dictionary":
        assert atoms is not None
        if atoms.shape[1] != dim:
            raise DacoError(f"the dictionary's atoms have width {atoms.shape[1]}, the activations {dim}")
        if known > latents:
            raise DacoError(
                f"the dictionary has {known} concepts, more than the {latents} latents; raise latents"
            )
        random[:known] = atoms
    norms = np.linalg.norm(random, axis=1, keepdims=True)
    if not norms.all():
        raise DacoError(f"atom {int(np.flatnonzero(norms == 0)[0])} of the dictionary is zero; make it again")
    return torch.tensor((random / norms).astype(np.float32))
