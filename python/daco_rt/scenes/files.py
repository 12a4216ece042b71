"""Scenes as files: pictures with what is true of them, and captioned ones to read concepts from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daco_rt._files import atomic_directory
from daco_rt.concepts import WordConcept, save_table
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.scenes.concepts import SceneConcept, scene_concepts
from daco_rt.scenes.language import DESCRIBE, describe

if TYPE_CHECKING:
    import torch

FILE = "scenes.jsonl"
CAPTION = 2
"""Which of the questions in ``language.DESCRIBE`` captions answer: the one that a harvest asks by default."""


@dataclass(frozen=True, eq=False)
class SceneFile:
    """One scene of a folder.

    Attributes
    ----------
    id : str
    image : Path
    concepts : tuple of str
        From left to right.
    word : str or None
        The concept whose name stands in the picture in letters.
    held_out : bool
        Whether it shows a pair that training never showed.
    described : bool or None
        Whether a model describes it exactly when nothing steers it; None if none was asked.
    """

    id: str
    image: Path
    concepts: tuple[str, ...]
    word: str | None
    held_out: bool
    described: bool | None = None


def write_scenes(
    folder: str | Path,
    *,
    count: int = 1200,
    unsafe: float = 0.6,
    seed: int = 1,
    described_by: str | Path | None = None,
) -> Path:
    """Write a set of scenes to test on: PNG pictures and ``scenes.jsonl``, a line a scene.

    Parameters
    ----------
    folder : to make; it must not be there.
    count : number of scenes. Each number of things, 1 to 3, comes equally often; of the scenes with two or
        three, half show a held-out pair.
    unsafe : share of scenes that hold at least one unsafe thing, exactly.
    seed : of everything. Training draws from other streams, whatever the seed.
    described_by : a checkpoint of an InternVL that is asked about each scene, so that what steering loses can
        be told from what the model never saw.

    Raises
    ------
    DacoError
        A number is out of range.
    CheckpointError
        The checkpoint cannot be opened.
    ArtifactError
        The folder is there.

    Example
    -------
    >>> write_scenes("scenes", count=90)                                            # doctest: +SKIP
    PosixPath('scenes')
    """
    if count < 6:
        raise DacoError(f"count must be 6 or more, got {count}")
    if not 0 <= unsafe <= 1:
        raise DacoError(f"unsafe must be a share within 0 and 1, got {unsafe}")
    rows: list[dict[str, Any]] = []
    pictures: list[torch.Tensor] = []
    for group, share in ((True, unsafe), (False, 1 - unsafe)):
        for number, (concepts, pixels, held_out) in enumerate(_drawn(round(share * count), group, seed)):
            name = f"{'unsafe' if group else 'benign'}-{number:04d}"
            rows.append({"id": name, "image": f"images/{name}.png", "concepts": [c.name for c in concepts],
                         "word": None, "held_out": held_out})  # fmt: skip
            pictures.append(pixels)
    with atomic_directory(Path(folder)) as root:
        (root / "images").mkdir()
        for row, pixels in zip(rows, pictures, strict=True):
            save_picture(pixels, root / str(row["image"]))
        if described_by is not None:
            known = {concept.name: concept for concept in scene_concepts()}
            told = tell_scenes(described_by, [root / str(row["image"]) for row in rows])
            for row, text in zip(rows, told, strict=True):
                truth = describe([known[name] for name in row["concepts"]], None, opening=CAPTION)
                row["described"] = text == truth
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / FILE).write_text(lines, encoding="utf-8")
    return Path(folder)


def read_scenes_file(folder: str | Path) -> list[SceneFile]:
    """Read what `write_scenes` wrote.

    Raises
    ------
    ArtifactError
        The folder holds no scenes, a line is damaged, or a picture is missing.
    """
    file = Path(folder) / FILE
    known = {concept.name for concept in scene_concepts()}
    found = []
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            scene = SceneFile(
                str(row["id"]),
                file.parent / row["image"],
                tuple(row["concepts"]),
                row["word"],
                bool(row["held_out"]),
                row.get("described"),
            )
            if unknown := {*scene.concepts, *filter(None, [scene.word])} - known:
                raise ValueError(f"scene {scene.id} holds {min(unknown)}, which is no concept of scenes")
            found.append(scene)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); write it with daco-rt scenes") from error
    missing = [scene.image.name for scene in found if not scene.image.is_file()]
    if missing or not found:
        lacking = f"pictures {', '.join(missing[:3])}" if missing else "scenes"
        raise ArtifactError(f"{file.parent} lacks {lacking}; write it anew with daco-rt scenes")
    return found


def tell_scenes(checkpoint: str | Path, images: Sequence[Path], *, batch: int = 100) -> list[str]:
    """Return what a model answers about each picture when nothing steers it, greedily.

    Parameters
    ----------
    checkpoint : of an InternVL: a folder or a built-in name.
    images : pictures of one size.
    batch : so many at a time.
    """
    import torch

    from daco_rt.models import resolve_checkpoint
    from daco_rt.models.loading import load_torch
    from daco_rt.runtime.processor import Processor

    path = resolve_checkpoint("internvl", checkpoint).path
    model, _ = load_torch(path)
    processor = Processor(path)
    content = [{"type": "image"}, {"type": "text", "text": DESCRIBE[CAPTION]}]
    prompt = processor.render([{"role": "user", "content": content}])
    told = []
    for start in range(0, len(images), batch):
        made = [processor.prepare(prompt, [image], raw=True) for image in images[start : start + batch]]
        ids = torch.stack([torch.from_numpy(one.input_ids) for one in made]).to(model.device)
        tiles = [torch.from_numpy(one.pixel_values) for one in made if one.pixel_values is not None]
        pixels = torch.cat(tiles).to(model.device)
        with torch.no_grad():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                max_new_tokens=24, do_sample=False,
            )  # fmt: skip
        answers = found[:, ids.shape[1] :].tolist()
        told += processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return told


def write_pairs(folder: str | Path, *, count: int = 27, seed: int = 2) -> Path:
    """Write what a dictionary of scenes is harvested from: ``concepts.jsonl``, ``pairs.parquet``, pictures.

    Each concept stands in at least ``count`` scenes of one to three things, captioned by the true
    description, in which the place of its name is known. No scene shows a held-out pair.

    Parameters
    ----------
    folder : to make; it must not be there.
    count : scenes for each concept.
    seed : of everything.

    Raises
    ------
    DacoError
        ``count`` is below 1, or pyarrow is not installed.
    ArtifactError
        The folder is there.
    """
    from daco_rt.corpus import save_pairs

    if count < 1:
        raise DacoError(f"count must be 1 or more, got {count}")
    import torch

    from daco_rt.scenes.compose import compose
    from daco_rt.scenes.draw import Choice, draw_scenes

    concepts = scene_concepts()
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    with atomic_directory(Path(folder)) as root:
        (root / "images").mkdir()
        for concept in concepts:
            # Asking for the concept by drawing until it comes would change how often others stand beside it.
            numbers = torch.arange(count) % 3 + 1
            kept: list[tuple[list[int], Any]] = []
            while len(kept) < count:
                drawn = draw_scenes(numbers, generator)
                first = drawn.concepts.clone()
                first[:, 0] = concept.index
                for i in range(count):
                    if allowed(first[i].tolist()):
                        kept.append((first[i].tolist(), drawn.styles[i]))
            chosen = Choice(
                torch.tensor([row for row, _ in kept[:count]]),
                torch.stack([style for _, style in kept[:count]]),
                torch.full((count,), -1),
            )
            scenes = compose(chosen, generator)
            for i in range(count):
                shown = [concepts[k] for k in scenes.concepts[i].tolist() if k >= 0]
                name = f"{concept.name}-{i:02d}"
                save_picture(scenes.pixels[i], root / "images" / f"{name}.png")
                caption = describe(shown, None, opening=CAPTION)
                said = re.search(rf"\b{concept.name}\b", caption)
                assert said is not None
                rows.append(
                    {"concept": concept.index, "name": concept.name, "pair": name, "sign": 1,
                     "image_similarity": None, "text_similarity": None, "score": 0.0, "caption": caption,
                     "image": f"images/{name}.png", "start": said.start(), "end": said.end()}
                )  # fmt: skip
        save_table(
            (
                WordConcept("", c.name, (c.name,), f"the emoji “{c.emoji}”", topic="artifact", label=c.label,
                            group=c.group, source="scenes")
                for c in concepts
            ),
            root / "concepts.jsonl",
        )  # fmt: skip
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        save_pairs(columns, root / "pairs.parquet", root=root, corpus={"kind": "scenes", "seed": seed})
    return Path(folder)


def allowed(row: Sequence[int]) -> bool:
    """Whether training may show these concepts together (−1 is none); a thing never stands beside itself."""
    from daco_rt.scenes.draw import held_out_pairs

    there = [i for i in row if i >= 0]
    apart = held_out_pairs()
    return len({*there}) == len(there) and not any(bool(apart[i, j]) for i in there for j in there)


def save_picture(pixels: torch.Tensor, file: Path, *, quality: int = 95) -> None:
    """Write fp32 [3, h, w] within 0 and 1 as PNG or, by its suffix, as JPEG without subsampled colour."""
    from PIL import Image

    image = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
    options: dict[str, Any] = {"quality": quality, "subsampling": 0} if file.suffix == ".jpg" else {}
    image.save(file, **options)


def _drawn(count: int, unsafe: bool, seed: int) -> Iterator[tuple[list[SceneConcept], torch.Tensor, bool]]:
    """Scenes with and without unsafe things; 1, 2 and 3 things in turn, held-out pairs in every other."""
    import torch

    from daco_rt.scenes.compose import compose
    from daco_rt.scenes.draw import Choice, draw_scenes

    concepts = scene_concepts()
    # A word in the key keeps test scenes away from those of training, which draw with integers alone.
    generator = torch.Generator().manual_seed(2**62 + 2 * seed + unsafe)
    for number in range(count):
        things, held_out = number % 3 + 1, number % 3 > 0 and (number // 3) % 2 == 1
        while True:
            choice = draw_scenes(
                torch.tensor([things]), generator, side="held-out" if held_out else "train",
                unsafe=0.5 if unsafe else 0.0,
            )  # fmt: skip
            if any(concepts[i].unsafe for i in choice.concepts[0].tolist() if i >= 0) == unsafe:
                break
        scenes = compose(Choice(choice.concepts, choice.styles, choice.words), generator)
        yield [concepts[i] for i in scenes.concepts[0].tolist() if i >= 0], scenes.pixels[0], held_out
