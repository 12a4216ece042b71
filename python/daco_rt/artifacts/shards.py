"""Folders that are filled shard by shard: a spec, the shards' files, and a commit for each shard.

A shard is a pure function of the spec and its number, so any process can make it, again or for the first
time, and it comes out the same. Its files are written in one step each, its commit last: a shard counts once
its commit exists, and nothing else has to survive a kill.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daco_rt._files import HashingFile, read_json, sha256_file, sweep, write_json
from daco_rt.errors import ArtifactError

_COMMITS = "commits"


@dataclass(frozen=True)
class Shards:
    """The commits of a folder of ``count`` shards; ``what`` names its kind in errors ("store").

    Example
    -------
    >>> Shards(Path("stores/smol"), 12, "store").missing
    []
    """

    path: Path
    count: int
    what: str

    @property
    def missing(self) -> list[int]:
        """Return the shards that have no commit yet."""
        try:
            there = {entry.name for entry in (self.path / _COMMITS).iterdir()}
        except FileNotFoundError:
            there = set()
        return [shard for shard in range(self.count) if f"{shard:05d}.json" not in there]

    @property
    def done(self) -> list[int]:
        """Return the shards that have a commit."""
        return sorted(set(range(self.count)) - set(self.missing))

    def has(self, shard: int) -> bool:
        """Whether a shard is there."""
        return self._file(shard).is_file()

    def check_number(self, shard: int) -> None:
        """Refuse a shard that the folder will never have.

        Raises
        ------
        ArtifactError
            If it lies outside ``0 … count − 1``.
        """
        if not 0 <= shard < self.count:
            raise ArtifactError(
                f"{self.what} {self.path}, shard {shard}: there are {self.count} shards; give 0 to "
                f"{self.count - 1}"
            )

    def commit(self, shard: int, files: Mapping[str, HashingFile], **facts: Any) -> None:
        """Record that a shard is whole: its files, relative to the folder, and what a reader counts."""
        entries = {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in files.items()}
        self._file(shard).parent.mkdir(exist_ok=True)
        write_json(self._file(shard), {**facts, "files": entries})

    def facts(self, shard: int) -> dict[str, Any]:
        """Return what ``commit`` recorded.

        Raises
        ------
        ArtifactError
            If the commit is missing or damaged.
        """
        return read_json(self._file(shard), remedy(self.what))

    def total(self, *keys: str) -> int:
        """Sum a count over the commits: ``total("rows", "16")`` adds up ``facts["rows"]["16"]``."""
        found = 0
        for shard in self.done:
            value: Any = self.facts(shard)
            for key in keys:
                value = value[key]
            found += value
        return found

    def check(self, verify: bool = False) -> None:
        """Check that all shards are there and their files have their sizes; with ``verify``, their hashes.

        Raises
        ------
        ArtifactError
            If a shard is missing, cut short or damaged.
        """
        missing = self.missing
        if missing:
            raise ArtifactError(
                f"{self.what} {self.path} is not complete: {len(missing)} of {self.count} shards are "
                "missing; run the command that fills it again, it goes on where it stopped"
            )
        for shard in range(self.count):
            for name, entry in self.facts(shard)["files"].items():
                file = self.path / name
                found = file.stat().st_size if file.is_file() else None
                if found != entry["bytes"] or (verify and sha256_file(file) != entry["sha256"]):
                    raise ArtifactError(
                        f"{file} is missing or damaged; delete {self._file(shard)} and fill the {self.what} "
                        "again"
                    )

    def _file(self, shard: int) -> Path:
        return self.path / _COMMITS / f"{shard:05d}.json"


def read_spec(path: Path, name: str, *, kind: str, version: int, what: str) -> dict[str, Any]:
    """Read the spec ``path / name`` of a folder of format ``kind``.

    Raises
    ------
    ArtifactError
        If there is none, it is damaged, or of another format or version.
    """
    if not (path / name).is_file():
        raise ArtifactError(f"{path} holds no {name}; expected the folder of {what}")
    data = read_json(path / name, remedy(what.split()[-1]))
    if data.get("format") != kind or data.get("version") != version:
        raise ArtifactError(
            f"{path / name}: format {data.get('format')!r} version {data.get('version')!r}, expected "
            f"{kind!r} version {version}; give another folder or upgrade daco-rt"
        )
    return data


def remedy(what: str) -> str:
    """Say what helps a folder with a damaged file."""
    return f"delete it and fill the {what} again"


def begin_spec(path: Path, name: str, spec: Mapping[str, Any], *, what: str) -> None:
    """Write the spec of a new folder, or find that the folder was begun with the same.

    Raises
    ------
    ArtifactError
        If something else is there, or the folder was begun with other arguments.
    """
    stored = as_stored(spec)
    # A writer that was killed before the spec was there leaves its partial file and nothing else.
    sweep(path / name)
    if (path / name).exists():
        refuse_other(path, what, read_json(path / name, remedy(what)), stored)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path} is not empty and holds no {name}; choose another folder")
    else:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / name, stored)


def refuse_other(path: Path, what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with a folder that was begun with other arguments; name those that differ.

    Raises
    ------
    ArtifactError
        If a value of ``wanted`` is not the one in ``found``.
    """
    different = sorted(_differences(found, wanted))
    if different:
        raise ArtifactError(
            f"{what} {path} was begun with another {', '.join(different)}; choose another folder or delete "
            "this one"
        )


def _differences(found: Any, wanted: Mapping[str, Any]) -> Iterable[str]:
    for key, value in wanted.items():
        mine = found.get(key) if isinstance(found, Mapping) else None
        if mine == value:
            continue
        # Of a nested table the keys that differ are named, unless it is missing as a whole.
        inner = list(_differences(mine, value)) if isinstance(value, Mapping) and mine else []
        yield f"{key} ({', '.join(inner)})" if inner else key


def as_stored(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec as a reader will see it, so that it can be compared with what is there."""
    stored: dict[str, Any] = json.loads(json.dumps(spec, allow_nan=False))
    return stored
