"""Small corpora for tests: pictures of one colour, captions, and the files they lie in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CAPTIONS = (
    "a dagger on a wooden table",
    "Two DAGGERS and a sword",
    "a bowl of soup",
    "fire truck in the street",
    "the old house by the lake, seen from the hill",
)


def picture(number: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    """A picture of one colour that tells its number."""
    return Image.new("RGB", size, (number * 40 % 256, 255 - number * 30 % 256, number))


def picture_bytes(number: int, form: str = "png") -> bytes:
    sink = io.BytesIO()
    picture(number).save(sink, form)
    return sink.getvalue()


def shows(image: Image.Image, number: int) -> bool:
    """Whether a picture (stored without loss) is that of the number."""
    return bool((np.asarray(image) == np.asarray(picture(number))).all())


def folder(path: Path, captions: Sequence[str] = CAPTIONS) -> Path:
    """A folder with captions.jsonl; picture i has the id "p<i>"."""
    (path / "images").mkdir(parents=True)
    rows = []
    for i, caption in enumerate(captions):
        picture(i).save(path / "images" / f"{i}.png")
        rows.append({"id": f"p{i}", "image": f"images/{i}.png", "caption": caption})
    (path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """An uncompressed tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
