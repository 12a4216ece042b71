"""The same computations in plain torch fp32, as one would write them without this project.

Norms of the atoms, the edited atoms' rows and the Gram matrix are given, as they would be computed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from workloads import SLOT, PolicyTables


@dataclass(frozen=True)
class Edit:
    """What the policy does, as tensors: gain [m], undesirable [m], shift [d], deadband, ‖A‖ [m]."""

    gain: Tensor
    shift: Tensor
    deadband: float
    norms: Tensor

    @classmethod
    def of(cls, tables: PolicyTables, atoms: Tensor) -> Edit:
        """Take the benchmarks' policy out of its tables."""
        return cls(
            torch.from_numpy(tables.gain[SLOT]),
            torch.from_numpy(tables.shift[SLOT]),
            float(tables.limits[SLOT, 0]),
            atoms.norm(dim=1),
        )

    def amounts(self, index: Tensor, code: Tensor) -> Tensor:
        """How much of each atom to add: (gain − 1)·c where the code is on."""
        on = code.abs() * self.norms[index] > self.deadband
        return torch.where(on, (self.gain[index] - 1) * code, 0)


def topk(z: Tensor, enc: Tensor, bias: Tensor, dec: Tensor, edit: Edit, k: int) -> Tensor:
    """TopK SAE: mm, relu, topk, gather, edit."""
    code, index = torch.addmm(bias, z, enc.T).relu_().topk(k, dim=1)
    delta = torch.bmm(edit.amounts(index, code).unsqueeze(1), dec[index]).squeeze(1)
    return z + delta + edit.shift


def relu(z: Tensor, enc: Tensor, bias: Tensor, watched: Tensor, rows: Tensor, edit: Edit) -> Tensor:
    """ReLU SAE: mm and relu over all latents, edit by the watched ones; ``rows`` are their decoder rows."""
    code = torch.addmm(bias, z, enc.T).relu_()[:, watched]
    return z + edit.amounts(watched, code) @ rows + edit.shift


def pursuit(z: Tensor, atoms: Tensor, gram: Tensor, edit: Edit, k: int) -> Tensor:
    """Positive batch OMP: one mm, then k steps of arg-max, one Gram row a row of z, and a batched solve.

    The Gram matrix is fp16 and chooses; coefficients come from fp32 dot products of the chosen atoms.
    """
    t, m = len(z), len(atoms)
    start = z @ atoms.T
    alpha = start.clone()
    every = torch.arange(t)
    index = torch.zeros(t, k, dtype=torch.long)
    columns = torch.empty(t, k, m)
    chosen = torch.empty(t, k, z.shape[1])
    inner = torch.empty(t, k, k)
    target = torch.empty(t, k)
    code = torch.empty(t, 0)
    taken = torch.zeros(t, m, dtype=torch.bool)
    for n in range(k):
        best = alpha.masked_fill_(taken, -torch.inf).argmax(dim=1)
        index[:, n] = best
        taken[every, best] = True
        target[:, n] = start[every, best]
        columns[:, n] = gram[best]
        chosen[:, n] = atoms[best]
        cross = torch.bmm(chosen[:, : n + 1], chosen[:, n].unsqueeze(2)).squeeze(2)
        inner[:, n, : n + 1] = cross
        inner[:, : n + 1, n] = cross
        code = torch.linalg.solve(inner[:, : n + 1, : n + 1], target[:, : n + 1])
        if n + 1 < k:
            alpha = torch.baddbmm(
                start.unsqueeze(1), code.unsqueeze(1), columns[:, : n + 1], alpha=-1
            ).squeeze(1)
    amounts = edit.amounts(index, code.clamp_min(0))
    return z + torch.bmm(amounts.unsqueeze(1), chosen).squeeze(1) + edit.shift
