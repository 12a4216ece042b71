"""The model in training: smol-internvl with its text model frozen, and the heads that teach its tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from scene_training import rounded_up

from daco_rt.errors import CheckpointError
from daco_rt.scenes import scene_concepts
from smol_vision.talk import Text

GROUND = len(scene_concepts())
GROUND_WEIGHT = 0.15


class Heads(torch.nn.Module):
    """What is thrown away after training: classes of patches, the way to the embedder's space."""

    def __init__(self, width: int, embedded: int) -> None:
        super().__init__()
        self.patches = torch.nn.Linear(width, GROUND + 1)
        self.captions = torch.nn.Linear(width, embedded)
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(20.0)))

    def pooled(self, seen: torch.Tensor) -> torch.Tensor:
        """Return unit vectors [n, embedded] of the patches' features [n, patches, width]."""
        return F.normalize(self.captions(seen.mean(1)).float(), dim=-1)


class Sight:
    """Tower and projector in fp32, the frozen text model in bf16.

    Parameters
    ----------
    folder : checkpoint whose text model, tokenizer and configuration are taken.
    start : safetensors file that holds a tower of the same shape; None starts from noise.
    embedded : width of the embedder.
    seed : of all that begins as noise.
    """

    def __init__(
        self, folder: Path, start: Path | None, embedded: int, seed: int, device: torch.device
    ) -> None:
        from transformers import AutoModel, InternVLForConditionalGeneration
        from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

        self.device, self.text = device, Text(folder)
        # Plain attention is faster than the fused one at these lengths on a CPU.
        self.net = InternVLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
        config = self.net.config
        torch.manual_seed(seed)
        self.net.model.vision_tower = AutoModel.from_config(config.vision_config, attn_implementation="eager")
        self.net.model.multi_modal_projector = InternVLMultiModalProjector(config)
        self.heads = Heads(config.vision_config.hidden_size, embedded)
        if start is not None:
            load_tower(self.tower, start)
        self.net.model.language_model.to(torch.bfloat16).requires_grad_(False)
        self.net.eval().to(device)
        self.heads.to(device)

    @property
    def tower(self) -> Any:
        return self.net.model.vision_tower

    @property
    def projector(self) -> Any:
        return self.net.model.multi_modal_projector

    @property
    def trained(self) -> dict[str, torch.nn.Module]:
        """What checkpoints hold."""
        return {"vision_tower": self.tower, "multi_modal_projector": self.projector, "heads": self.heads}

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the patches' features [n, 64, 192] of prepared pictures [n, 3, 64, 64]."""
        seen: torch.Tensor = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
        return seen

    def tokens(self, seen: torch.Tensor) -> torch.Tensor:
        """Return what the text model gets for the pictures: [n, 16, d]."""
        side = math.isqrt(seen.shape[1])
        mixed = self.net.model.pixel_shuffle(seen.unflatten(1, (side, side)), scale_factor=0.5)
        found: torch.Tensor = self.projector(mixed.flatten(1, 2))
        return found

    @torch.no_grad()
    def word_vectors(self, names: Sequence[str]) -> torch.Tensor:
        """Return each name's mean input embedding, and last the mean of all: fp32 [names + 1, d]."""
        table = self.net.get_input_embeddings().weight
        rows = [
            table[torch.tensor(self.text.ids(f" {name}"), device=self.device)].float().mean(0)
            for name in names
        ]
        found = torch.stack(rows)
        return torch.cat([found, found.mean(0, keepdim=True)])

    @torch.no_grad()
    def round_to_stored(self) -> None:
        """Round tower and projector to the fp16 in which they are stored."""
        for part in (self.tower, self.projector):
            for parameter in part.parameters():
                parameter.copy_(parameter.half().float())

    @torch.no_grad()
    def answer(self, pixels: torch.Tensor, question: str, *, system: str, longest: int = 32) -> list[str]:
        """Answer a question about each prepared picture greedily."""
        prompt = [*self.text.beginning(system), *self.text.asked(question)]
        found = []
        for part in pixels.split(50):
            ids = torch.tensor([prompt], device=self.device).expand(len(part), -1)
            out = self.net.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=part.to(self.device),
                max_new_tokens=longest,
                do_sample=False,
            )
            told = out[:, ids.shape[1] :].tolist()
            found += [
                text.strip() for text in self.text.tokenizer.decode_batch(told, skip_special_tokens=True)
            ]
        return found


def load_tower(tower: torch.nn.Module, file: Path) -> None:
    """Fill a tower from the tensors ``vision_tower.*`` of a safetensors file.

    Raises
    ------
    CheckpointError
        The file cannot be read or holds a tower of another shape.
    """
    try:
        with safe_open(str(file), framework="pt") as stored:
            names = [name for name in stored.keys() if name.startswith("vision_tower.")]  # noqa: SIM118
            state = {name.removeprefix("vision_tower."): stored.get_tensor(name).float() for name in names}
    except Exception as error:  # safetensors raises its own kind
        raise CheckpointError(
            f"{file} cannot be read ({error}); train scenes-internvl first, or give --start another file or"
            " noise"
        ) from error
    wanted = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != given:
        differ = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        name = differ[0]
        raise CheckpointError(
            f"{file}: vision_tower.{name} is {given.get(name, 'missing')}, expected"
            f" {wanted.get(name, 'no such tensor')}; give --start a tower of smol-internvl's shape, or noise"
        )
    tower.load_state_dict(state)


def look_losses(
    sight: Sight, batch: dict[str, torch.Tensor], bank: torch.Tensor, words: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the losses of the first stage: "patches", "captions", "words".

    Parameters
    ----------
    batch : ``pixels`` [s + p, 3, 64, 64] of s scenes and p pictures; ``patches`` [s, 8, 8], the scenes'
        concepts; ``things`` [p], the pictures'; ``captions`` [things], which caption of each thing counts in
        this step; ``tokens`` [s + p, 16], the thing under each image token, or the number of things.
    bank : unit vectors [things, captions, embedded] of all captions.
    words : from `Sight.word_vectors`, of all things.
    """
    scenes = len(batch["patches"])
    seen = sight.see(batch["pixels"])
    weight = torch.ones(GROUND + 1, device=seen.device)
    weight[GROUND] = GROUND_WEIGHT
    classes = sight.heads.patches(seen[:scenes]).float().flatten(0, 1)
    losses = {"patches": F.cross_entropy(classes, batch["patches"].flatten(), weight=weight)}
    # Each picture against one caption of every thing, and each thing's caption against the step's pictures.
    said = bank[torch.arange(len(bank), device=bank.device), batch["captions"]]
    scale = sight.heads.log_scale.exp().clamp(max=100.0)
    pooled = sight.heads.pooled(seen[scenes:])
    alike = scale * (pooled @ said.T)
    across = alike[:, batch["things"]]
    here = torch.arange(len(across), device=seen.device)
    losses["captions"] = F.cross_entropy(alike, batch["things"]) + 0.5 * F.cross_entropy(across.T, here)
    # Image tokens near the words for what they show: the text model understands them from the start.
    told, wanted = sight.tokens(seen).float().flatten(0, 1), batch["tokens"].flatten()
    mean = words[-1]
    shown = wanted < len(words) - 1
    at = rounded_up(shown, 256)
    named = wanted.masked_fill(~shown, -100)[at]
    directions = F.normalize(words[:-1] - mean, dim=-1)
    near = 20.0 * F.normalize(told[at] - mean, dim=-1) @ directions.T
    spread = (words[:-1] - mean).square().mean()
    losses["words"] = F.cross_entropy(near, named) + F.mse_loss(told, words[wanted]) / spread
    return losses
