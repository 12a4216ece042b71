"""Put the pictures of the scenes' concepts into one file of the package.

    bash scripts/fetch_pictures.sh
    python scripts/build_sprites.py [--pictures DIR] [--output FILE]

Pictures are those of Noto Emoji and Twemoji, as npm's emoji-datasource packages carry them (THIRD_PARTY.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from daco_rt.scenes.concepts import FOLDER, SPRITE, STYLES, scene_concepts

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, default=ROOT / "build/deps/pictures", metavar="DIR")
    parser.add_argument("--output", type=Path, default=FOLDER / "sprites.png", metavar="FILE")
    arguments = parser.parse_args()
    concepts = scene_concepts()
    atlas = Image.new("RGBA", (SPRITE * len(STYLES), SPRITE * len(concepts)))
    for column, style in enumerate(STYLES):
        folder = arguments.pictures / f"emoji-{style}"
        captions = folder / "captions.jsonl"
        if not captions.is_file():
            print(f"{captions} is not there; run scripts/fetch_pictures.sh first", file=sys.stderr)
            return 2
        rows = [json.loads(line) for line in captions.read_text(encoding="utf-8").splitlines()]
        images = {row["label"]: folder / row["image"] for row in rows}
        for concept in concepts:
            with Image.open(images[concept.emoji]) as picture:
                tile = picture.convert("RGBA").resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
            atlas.paste(tile, (column * SPRITE, concept.index * SPRITE))
    atlas.save(arguments.output, optimize=True)
    print(f"wrote {arguments.output}: {len(concepts)} concepts in {len(STYLES)} styles")
    return 0


if __name__ == "__main__":
    sys.exit(main())
