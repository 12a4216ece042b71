"""What the training scripts share: pictures as a model takes them, optimisers, learning rates, checkpoints.

A checkpoint is one safetensors file: weights, the optimisers' state, and a record of the run as text. What
a step needs is drawn from a seed of that step, so a run that goes on from a checkpoint sees the data that it
would have seen.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Do to pictures [n, 3, 64, 64] within 0 and 1 what the image processor does to files of 8 bits."""
    return ((pixels * 255).round() / 255 - MEAN) / STD


def schedule(step: int, steps: int, *, warm: int = 100) -> float:
    """A warm-up, then half a cosine down to a hundredth."""
    return min(1.0, (step + 1) / warm) * max(0.01, 0.5 * (1 + math.cos(math.pi * step / steps)))


def rounded_up(wanted: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return the indices of what is true in bool [n], and of enough that is not to make a multiple of them.

    The CPU's matrix library compiles and keeps a kernel for each shape it meets: there should be few.
    """
    at = wanted.nonzero().flatten()
    return torch.cat([at, (~wanted).nonzero().flatten()[: -len(at) % multiple]])


def make_optimisers(named: Iterable[tuple[str, torch.nn.Parameter]], *, scale: float = 1.0) -> list[Any]:
    """Muon for the matrices between hidden states, AdamW for all else.

    Parameters
    ----------
    named : parameters with their names; those of embeddings and heads are left to AdamW.
    scale : factor of the learning rate that `set_rate` gives.
    """
    parameters = list(named)
    matrices = [p for n, p in parameters if p.ndim == 2 and not re.search("embed|head", n)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in parameters if id(p) not in chosen]
    decayed, plain = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim <= 1]
    muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.98),
    )
    for optimiser, share in ((muon, 1.0), (adamw, 0.7)):
        for group in optimiser.param_groups:
            group["scale"] = share * scale
    return [muon, adamw]


def set_rate(optimisers: Iterable[Any], rate: float) -> None:
    """Set the learning rate of every group to ``rate`` times the group's scale."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate * group["scale"]


def save_checkpoint(
    path: Path, modules: Mapping[str, torch.nn.Module], optimisers: Iterable[Any], about: Mapping[str, Any]
) -> None:
    """Write weights and optimisers to ``path`` in one step, with ``about`` as JSON in its header."""
    tensors = {f"{part}.{k}": v for part, m in modules.items() for k, v in m.state_dict().items()}
    for i, optimiser in enumerate(optimisers):
        for j, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{j}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"about": json.dumps(dict(about))})
    partial.replace(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts in the header of a safetensors file."""
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})


def read_about(path: Path) -> dict[str, Any]:
    """Return what `save_checkpoint` was told of the run."""
    found: dict[str, Any] = json.loads(read_metadata(path)["about"])
    return found


def load_checkpoint(
    path: Path, modules: Mapping[str, torch.nn.Module], optimisers: Iterable[Any] = ()
) -> dict[str, Any]:
    """Load into ``modules`` and ``optimisers`` what `save_checkpoint` wrote, and return its ``about``."""
    tensors = load_file(path)
    for part, module in modules.items():
        module.load_state_dict(
            {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        )
    for i, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimiser.{i}."):
                _, _, index, key = name.split(".", 3)
                state.setdefault(int(index), {})[key] = value
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return read_about(path)
