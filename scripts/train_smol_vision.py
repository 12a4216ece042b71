"""Train vision tower and projector of smol-internvl, and write them and their record into the package.

    bash scripts/fetch_pictures.sh                                  # once, 430 MB
    python scripts/fetch_embedder.py                                # once, 84 MB
    python scripts/train_smol_vision.py --work runs/smol-vision     # an hour and a half on one core
    python scripts/train_smol_vision.py --work runs/smol-vision     # again: goes on where it was stopped

The language model is never changed. Two stages, each with a learning rate that warms up and falls to nothing:

    look   the tower, started from that of scenes-internvl, learns which concept covers each patch of a scene
           and which caption fits a picture (contrastive, against a sentence embedder); the projector puts
           image tokens near the words for what they show. The language model is not run
    talk   projector and, at a fifth of the rate, tower learn from the frozen language model's loss on answers
           to questions about scenes, emoji and clip art

Kept for the examination: one emoji in ten in its second style, pairs of concepts in scenes, all stamps of Tux
Paint. Its shares, and all else about the run, are in training.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scene_training import (
    load_checkpoint,
    make_optimisers,
    read_about,
    read_metadata,
    save_checkpoint,
    schedule,
    set_rate,
)
from smol_vision.batches import Batches, Stage
from smol_vision.exam import Exam
from smol_vision.pictures import Gallery, load_gallery
from smol_vision.sight import Sight, look_losses
from smol_vision.talk import answer_loss

from daco_rt.corpus.encoders import load_encoder
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.models.catalogue import ensure
from daco_rt.models.scenes import ASSETS as SCENES
from daco_rt.models.smol import NAME, VISION

DEPS = Path(__file__).resolve().parents[1] / "build" / "deps"
TOWER_RATE = 0.2
"""The tower's share of the learning rate in the second stage."""
NOTE, KEEP = 50, 200
"""Steps between lines of the log, and between checkpoints."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and caches")
    parser.add_argument(
        "--output", type=Path, default=VISION.parent, help="folder to write (default: in the package)"
    )
    parser.add_argument(
        "--pictures", type=Path, default=DEPS / "pictures", help="what fetch_pictures.sh wrote"
    )
    parser.add_argument("--embedder", type=Path, default=DEPS / "minilm", help="what fetch_embedder.py wrote")
    parser.add_argument(
        "--start", default=str(SCENES / "weights.safetensors"), metavar="FILE",
        help="safetensors file with a trained tower, or the word noise (default: that of scenes-internvl)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(1600, 540), metavar="N", help="of the two stages"
    )
    parser.add_argument(
        "--sizes", type=int, nargs=3, default=(64, 96, 24), metavar="N",
        help="scenes and pictures a step of the first stage, pictures a step of the second",
    )  # fmt: skip
    parser.add_argument(
        "--examined", type=int, default=200, metavar="N", help="pictures of a kind to examine with"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--checkpoint", default=NAME, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        train(arguments)
    except DacoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(arguments: argparse.Namespace) -> None:
    """Do what is left of the training, examine, and write the result."""
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    scenes, pictures, spoken = arguments.sizes
    stages = [
        Stage("look", arguments.steps[0], scenes, pictures, 0, 1e-3),
        Stage("talk", arguments.steps[1], spoken // 2, spoken - spoken // 2, 4, 1e-3),
    ]
    gallery = load_gallery(arguments.pictures, work / "pictures.safetensors")
    captions = Captions(gallery, arguments.embedder, work / "captions.safetensors")
    start = None if arguments.start == "noise" else Path(arguments.start)
    folder = ensure(arguments.checkpoint)
    device = torch.device(arguments.device)
    sight = Sight(folder, start, captions.bank.shape[-1], arguments.seed, device)
    trainer = Trainer(sight, gallery, captions.bank, work, arguments.seed, folder)
    for stage in stages:
        trainer.run(stage)
    sight.round_to_stored()
    shares = Exam(sight, captions.embed, arguments.examined).run(gallery, arguments.pictures)
    print(json.dumps(shares, indent=1))
    write(
        sight,
        arguments.output,
        {
            "script": "scripts/train_smol_vision.py",
            "seed": arguments.seed,
            "torch": torch.__version__,
            "started from": "noise" if start is None else start.name,
            "embedder": captions.encoder.describe() | {"name": "all-MiniLM-L6-v2"},
            "things": len(gallery.things),
            "pictures": sum(len(thing.pictures) for thing in gallery.things),
            "held-out pictures": sum(len(thing.held) for thing in gallery.things),
            "stages": [stage._asdict() for stage in stages],
            "shares": shares,
            "log": trainer.log,
        },
    )


class Captions:
    """All captions as unit vectors around their mean: ``bank`` [things, captions, embedded]; cached."""

    def __init__(self, gallery: Gallery, embedder: Path, cache: Path) -> None:
        if not embedder.is_dir():
            raise ArtifactError(f"{embedder} is no embedder's folder; run python scripts/fetch_embedder.py")
        self.encoder = load_encoder(embedder)
        texts = [caption for thing in gallery.things for caption in thing.captions]
        key = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        raw = torch.empty(len(texts), self.encoder.dim)
        about = {"texts": key, "embedder": self.encoder.describe()["weights"]}
        if cache.is_file() and read_metadata(cache) == about:
            raw = load_file(cache)["raw"]
        else:
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
            for first in range(0, len(order), 64):
                part = order[first : first + 64]
                raw[part] = torch.from_numpy(self.encoder.texts([texts[i] for i in part]))
            save_file({"raw": raw}, cache, about)
        # All captions share a direction, which says nothing of the picture.
        self.mean = raw.mean(0)
        self.bank = self._centred(raw).unflatten(0, (len(gallery.things), -1))

    def embed(self, texts: list[str]) -> torch.Tensor:
        """Return unit vectors of texts around the captions' mean: fp32 [n, embedded]."""
        return self._centred(torch.from_numpy(self.encoder.texts(texts)))

    def _centred(self, raw: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(raw - self.mean, dim=-1)


class Trainer:
    """Runs stages, or what is left of them."""

    def __init__(
        self, sight: Sight, gallery: Gallery, bank: torch.Tensor, work: Path, seed: int, folder: Path
    ) -> None:
        self.sight, self.gallery, self.work, self.seed, self.folder = sight, gallery, work, seed, folder
        self.bank = bank.to(sight.device)
        self.words = sight.word_vectors([thing.name for thing in gallery.things])
        self.log: list[dict[str, Any]] = []

    def run(self, stage: Stage) -> None:
        """Train one stage."""
        sight, done = self.sight, self.work / f"{stage.name}.safetensors"
        if done.is_file():
            self.log = load_checkpoint(done, sight.trained)["log"]
            return
        named = {part: [*module.named_parameters(prefix=part)] for part, module in sight.trained.items()}
        if stage.questions:
            tower = make_optimisers(named["vision_tower"], scale=TOWER_RATE)
            optimisers = [*make_optimisers(named["multi_modal_projector"]), *tower]
            chosen = [p for part in ("multi_modal_projector", "vision_tower") for _, p in named[part]]
        else:
            optimisers = make_optimisers([pair for pairs in named.values() for pair in pairs])
            chosen = [p for pairs in named.values() for _, p in pairs]
        step, latest = 0, self.work / "latest.safetensors"
        if latest.is_file() and read_about(latest)["stage"] == stage.name:
            about = load_checkpoint(latest, sight.trained, optimisers)
            step, self.log = about["step"], about["log"]
            print(f"goes on at step {step} of stage {stage.name}", flush=True)
        drawn = Batches(stage, step, self.seed, self.gallery, self.folder)
        loader = torch.utils.data.DataLoader(drawn, batch_size=None, num_workers=1, prefetch_factor=4)
        began, first, means = time.time(), step, dict[str, float]()
        for batch in loader:
            set_rate(optimisers, stage.rate * schedule(step, stage.steps))
            losses = self._losses(stage, {k: v.to(sight.device) for k, v in batch.items()})
            total = sum(losses.values(), torch.zeros((), device=sight.device))
            if not math.isfinite(total.item()):
                raise SystemExit(
                    f"the loss is {total.item()} at step {step} of stage {stage.name}; lower the rate"
                )
            total.backward()
            torch.nn.utils.clip_grad_norm_(chosen, 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            step += 1
            for name, loss in losses.items():
                means[name] = 0.95 * means.get(name, loss.item()) + 0.05 * loss.item()
            if step % NOTE == 0 or step == stage.steps:
                self.log.append(
                    {"stage": stage.name, "step": step, **{k: round(v, 4) for k, v in means.items()}}
                )
                rate = (step - first) / (time.time() - began)
                left = (stage.steps - step) / rate / 60
                print(
                    json.dumps(self.log[-1]),
                    f"{rate:.2f} steps/s, {left:.0f} min left of this stage",
                    flush=True,
                )
            if step % KEEP == 0 and step < stage.steps:
                about = {"stage": stage.name, "step": step, "log": self.log}
                save_checkpoint(latest, sight.trained, optimisers, about)
        save_checkpoint(done, sight.trained, [], {"stage": stage.name, "step": step, "log": self.log})

    def _losses(self, stage: Stage, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sight = self.sight
        with torch.autocast(sight.device.type, torch.bfloat16):
            if not stage.questions:
                return look_losses(sight, batch, self.bank, self.words)
            features = sight.tokens(sight.see(batch["pixels"]))
            return {"answers": answer_loss(sight.net, features, batch, sight.text.image)}


def write(sight: Sight, output: Path, record: dict[str, Any]) -> None:
    """Write tower and projector in fp16 under the names of a checkpoint, and the record."""
    output.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{name}": value.half().cpu().contiguous()
        for part in ("vision_tower", "multi_modal_projector")
        for name, value in sight.trained[part].state_dict().items()
    }
    partial = output / "vision.partial"
    save_file(tensors, partial)
    (output / "training.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    partial.chmod(0o644)  # safetensors makes files that only their owner reads
    partial.replace(output / VISION.name)
    print(f"wrote {output / VISION.name}")


if __name__ == "__main__":
    sys.exit(main())
