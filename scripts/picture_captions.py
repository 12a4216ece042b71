"""Turn an unpacked package of pictures into a folder with captions.jsonl: part of fetch_pictures.sh.

usage: picture_captions.py emoji-google | emoji-twitter | openclipart | tuxpaint  UNPACKED  OUTPUT
       picture_captions.py join FOLDER  (one captions.jsonl of all folders in it but tuxpaint, whose licence
       differs)

UNPACKED holds the packages, each in a folder of its name. A line of captions.jsonl has image, caption, and
what the caption was made of.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PIXELS = 16_000_000
"""Larger pictures are left out: a few stop signs and cards were drawn at hundreds of millions of pixels."""
Rows = Iterator[tuple[Path, dict[str, Any]]]


def emoji(unpacked: Path, maker: str) -> Rows:
    """Pictures of base emoji, captioned "label: tags (subgroup)"."""
    package = unpacked / f"emoji-datasource-{maker}"
    words = json.loads((unpacked / "emojibase-data/en/data.json").read_bytes())
    groups = json.loads((unpacked / "emojibase-data/meta/groups.json").read_bytes())["subgroups"]
    # Variation selectors are written in one list and left out in the other.
    by_code = {entry["hexcode"].replace("-FE0F", ""): entry for entry in words}
    for entry in json.loads((package / "emoji.json").read_bytes()):
        image = package / "img" / maker / "64" / entry["image"]
        known = by_code.get(entry["unified"].replace("-FE0F", ""))
        if known is None or not entry[f"has_img_{maker}"] or not image.is_file():
            continue
        label, group = known["label"], groups.get(str(known.get("subgroup")), "").replace("-", " ")
        tags = [tag for tag in known.get("tags", []) if tag not in label.lower().split()]
        caption = label + (": " + ", ".join(tags) if tags else "") + (f" ({group})" if group else "")
        yield image, {"caption": caption, "label": label, "tags": tags, "subgroup": group}


def openclipart(unpacked: Path) -> Rows:
    """Clip art, captioned by the title and description in the picture and the folder it is filed under."""
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
    root = unpacked / "openclipart-png/usr/share/openclipart/png"
    for image in sorted(root.rglob("*.png")):
        if image.is_symlink():
            continue
        try:
            with Image.open(image) as picture:
                if picture.width * picture.height > PIXELS:
                    raise ValueError(f"{picture.width} × {picture.height} pixels are too many")
                said = {key: html.unescape(str(value)) for key, value in picture.info.items()}
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            print(f"left out: {image.name}: {error}", file=sys.stderr)
            continue
        # Names end in the author's and a number: chemistry_flask_matthew__02.
        name = re.sub(r"[_-]+", " ", re.sub(r"_[a-z]+_[a-z_.-]*_?\d\d$", "", image.stem)).strip()
        title = said.get("Title", "").strip() or name
        about = said.get("Description", "").strip()
        folder = [part.replace("_", " ") for part in image.relative_to(root).parts[:-1]]
        parts = [title, *([name] if name.lower() not in title.lower() else []), *([about] if about else [])]
        caption = ". ".join(part.rstrip(".") for part in parts) + f" ({', '.join(reversed(folder))})"
        author = said.get("Author", "")
        yield image, {"caption": " ".join(caption.split())[:400], "title": title, "author": author}


def tuxpaint(unpacked: Path) -> Rows:
    """Stamps with the English sentence of the text file beside each."""
    root = unpacked / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
    for image in sorted(root.rglob("*.png")):
        text = image.with_suffix(".txt")
        if text.is_file() and "_mirror" not in image.stem:
            yield image, {"caption": text.read_text("utf-8", errors="replace").split("\n")[0].strip()}


def join(folder: Path) -> None:
    """Write one captions.jsonl for the folders of pictures that may be used for any purpose."""
    lines = []
    for file in sorted(folder.glob("*/captions.jsonl")):
        if file.parent.name != "tuxpaint":
            for row in map(json.loads, file.read_text("utf-8").splitlines()):
                row["image"] = f"{file.parent.name}/{row['image']}"
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "join":
        return join(Path(sys.argv[2]))
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    kind, unpacked, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if kind.startswith("emoji-"):
        rows, licence = emoji(unpacked, kind[6:]), [unpacked / f"emoji-datasource-{kind[6:]}/README.md"]
        licence += [unpacked / f"emoji-datasource-{kind[6:]}/LICENSE", unpacked / "emojibase-data/LICENSE"]
    elif kind == "openclipart":
        package = "openclipart-png"
        rows, licence = openclipart(unpacked), [unpacked / package / "usr/share/doc" / package / "copyright"]
    else:
        package = "tuxpaint-stamps-default"
        rows, licence = tuxpaint(unpacked), [unpacked / package / "usr/share/doc" / package / "copyright"]
    shutil.rmtree(output, ignore_errors=True)
    (output / "images").mkdir(parents=True)
    for number, file in enumerate(licence):
        shutil.copy(file, output / f"{number}-{file.name}")
    lines = []
    for number, (image, row) in enumerate(rows):
        name = f"images/{number:05d}-{image.name}"
        shutil.copy(image, output / name)
        line = {"id": f"{kind}/{number:05d}-{image.stem}", "image": name, **row}
        lines.append(json.dumps(line, ensure_ascii=False))
    if not lines:
        sys.exit(f"{unpacked} holds no captioned pictures of {kind}; the package has changed")
    text = "".join(f"{line}\n" for line in lines)
    (output / "captions.jsonl").write_text(text, encoding="utf-8", errors="replace")


if __name__ == "__main__":
    main()
