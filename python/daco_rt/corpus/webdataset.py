"""webdataset shards: tar files in which ``key.jpg``, ``key.txt`` and ``key.json`` are one sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from daco_rt.corpus.pairs import Corpus, Pair, decode
from daco_rt.corpus.references import tar_index
from daco_rt.errors import DacoError

IMAGES = ("jpg", "jpeg", "png", "webp")
_FIELDS = ("caption", "text", "txt")


class WebdatasetCorpus(Corpus):
    """Samples in tar files, uncompressed.

    A sample is what shares shard and key, the member's name up to the first dot of its last part. The caption
    is the member ``txt``; without it the field ``caption`` (or ``text``) of ``json``. The id is the field
    ``key`` of ``json`` if there is one, else ``shard/key``. Members are found by an index that is built once
    and read by offset; they may stand in any order.

    Parameters
    ----------
    shards : a folder of ``.tar`` files, a pattern (``"cc3m-train-*.tar"``), one file, or several.

    Raises
    ------
    DacoError
        If there is no shard, one is no tar file, or they lie under different roots.

    Example
    -------
    >>> next(iter(WebdatasetCorpus("cc3m")))
    Pair(id='cc3m-train-0000/000000042', caption='a dagger', image_ref='cc3m-train-0000.tar#000000042.jpg')
    """

    kind = "webdataset"

    def __init__(self, shards: str | Path | Sequence[str | Path]) -> None:
        if isinstance(shards, str | Path):
            place = Path(shards)
            if place.is_dir():
                found = sorted(place.glob("*.tar"))
            else:
                found = sorted(map(Path, glob(str(shards)))) if has_magic(str(shards)) else [place]
        else:
            found = [Path(shard) for shard in shards]
        if not found:
            raise DacoError(f"{shards} holds no .tar file; give a folder, a file or a pattern of shards")
        if missing := [shard for shard in found if not shard.is_file()]:
            raise DacoError(f"{missing[0]} is not a file; give a folder, a file or a pattern of shards")
        if odd := [shard for shard in found if shard.suffix != ".tar"]:
            raise DacoError(
                f"{odd[0]} is not called .tar; unpack compressed shards first, members are read by offset"
            )
        if len({shard.parent.resolve() for shard in found}) > 1:
            raise DacoError(f"shards must lie in one folder, got {found[0].parent} and others")
        super().__init__(found[0].parent)
        self.shards = found

    @property
    def size(self) -> int:
        """The number of pictures, usable or not; builds the indexes."""
        return sum(
            name.lower().endswith(IMAGES) for shard in self.shards for name in tar_index(shard).members
        )

    def read(self) -> Iterator[Pair]:
        """Yield the samples, shard by shard, in the order of their first members."""
        for shard in self.shards:
            index = tar_index(shard)
            if index.damage:
                self.problems.add("shard is cut short", shard.name, index.damage)
            samples: dict[str, dict[str, str]] = {}
            for name in index.members:
                folder, _, last = name.rpartition("/")
                key, _, extension = last.partition(".")
                samples.setdefault(f"{folder}/{key}" if folder else key, {})[extension.lower()] = name
            with open(shard, "rb") as file:

                def content(name: str, file: Any = file, places: Any = index.members) -> bytes:
                    file.seek(places[name][0])
                    return file.read(places[name][1])

                for key, members in samples.items():
                    pair = self._sample(shard, key, members, content)
                    if pair is not None:
                        yield pair

    def describe(self) -> dict[str, Any]:
        """Return kind, shards and a hash of their names, members and sizes (contents are not hashed)."""
        digest = hashlib.sha256()
        for shard in self.shards:
            index = tar_index(shard)
            rows = [shard.name, shard.stat().st_size, list(index.members.items()), index.damage]
            digest.update(json.dumps(rows).encode())
        return {"kind": self.kind, "shards": len(self.shards), "members_sha256": digest.hexdigest()}

    def _sample(self, shard: Path, key: str, members: dict[str, str], content: Any) -> Pair | None:
        name = f"{shard.stem}/{key}"
        image = next((members[extension] for extension in IMAGES if extension in members), None)
        extra: dict[str, Any] = {}
        if "json" in members:
            try:
                extra = json.loads(decode(content(members["json"])))
                if not isinstance(extra, dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                self.problems.add("member is not JSON", name, f"{shard}#{members['json']}: {error}")
                extra = {}
        if "txt" in members:
            caption: Any = decode(content(members["txt"]))
        else:
            caption = next((extra[field] for field in _FIELDS if field in extra), None)
        if image is None:
            self.problems.add("picture missing", name, str(shard))
        elif not isinstance(caption, str):
            self.problems.add("caption missing", name, str(shard))
        else:
            return Pair(str(extra.get("key") or name), caption, f"{shard.name}#{image}")
        return None
