"""Embeddings of a corpus on disk, in shards that are written and committed one by one.

::

    embeddings/embeddings.json           encoder, corpus, width, pairs a shard
    embeddings/shards/00007.safetensors  text [n, d], image [n, d] (fp16, norm 1)
    embeddings/shards/00007.parquet      id, caption, image: what the rows are of
    embeddings/commits/00007.json        rows, hashes, problems; written when both files lie there
    embeddings/complete.json             how many shards there are; written last

A shard is a fixed share of the corpus, so it can be made again and comes out the same. A pair whose picture
cannot be opened has no row, so shards may be shorter than their share.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt._files import atomic_file, read_json, sha256_file, write_json
from daco_rt.artifacts import from_array, read_header, write_safetensors
from daco_rt.artifacts.shards import begin_spec, read_spec
from daco_rt.corpus.arrow import arrow
from daco_rt.corpus.pairs import Pair, Problems
from daco_rt.errors import ArtifactError

FORMAT, VERSION = "daco_rt.embeddings", 1
SHARD = 16_384
_SPEC, _DONE = "embeddings.json", "complete.json"
_REMEDY = "delete it and run the command that embeds the corpus again"


@dataclass(frozen=True, eq=False)
class EmbeddingStore:
    """Embeddings of a corpus, complete or being filled; serves ``daco_rt.corpus.search`` as its pairs.

    ``dim`` is d, ``images`` whether pictures were embedded, ``encoder`` and ``corpus`` say what made the rows
    and what they are of, ``shard_pairs`` how many pairs of the corpus make one shard.

    Example
    -------
    >>> store = open_embeddings("embeddings/cc3m")
    >>> image, text = store.block(0, 1000)
    >>> text.shape == (1000, store.dim)
    True
    """

    path: Path
    dim: int
    images: bool
    shard_pairs: int
    encoder: dict[str, Any] = field(repr=False)
    corpus: dict[str, Any] = field(repr=False)

    @property
    def shards(self) -> int | None:
        """The number of shards; None while the store is being filled."""
        done = self.path / _DONE
        return int(read_json(done, _REMEDY)["shards"]) if done.is_file() else None

    def committed(self, shard: int) -> bool:
        """Whether a shard lies there."""
        return self._commit_file(shard).is_file()

    @cached_property
    def _starts(self) -> np.ndarray:
        """Number of the first row of each shard, and of all rows; fixed once the store is complete."""
        rows = [int(self._commit(shard)["rows"]) for shard in range(self.shards or 0)]
        return np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    @property
    def rows(self) -> int:
        """How many pairs have embeddings, of a complete store."""
        return int(self._starts[-1])

    def problems(self) -> Problems:
        """Return what was skipped, of a complete store: by the reader, then picture by picture."""
        found = Problems()
        parts = [read_json(self.path / _DONE, _REMEDY), *map(self._commit, range(self.shards or 0))]
        for part in parts:
            found.counts += Counter(part["problems"])
            found.listed += part["listed"]
        return found

    def block(self, start: int, stop: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Return image and text embeddings of a range of rows, fp16 [stop − start, d]; mapped where one shard
        holds them."""
        parts = [
            tuple(table[low:high] for table in self._tables(shard) if table is not None)
            for shard, low, high in self._spans(start, stop)
        ]
        if not parts:
            empty = np.zeros((0, self.dim), np.float16)
            return (empty if self.images else None), empty
        joined = [part[0] if len(part) == 1 else np.concatenate(part) for part in zip(*parts, strict=True)]
        return (joined[1] if self.images else None), joined[0]

    def take(self, rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """Return image and text embeddings of some rows, fp16 [n, d]."""
        found = [np.empty((len(rows), self.dim), np.float16) for _ in range(1 + self.images)]
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shard_of):
            at = np.flatnonzero(shard_of == shard)
            tables = (table for table in self._tables(int(shard)) if table is not None)
            for target, table in zip(found, tables, strict=True):
                target[at] = table[rows[at] - self._starts[shard]]
        return (found[1] if self.images else None), found[0]

    def pairs(self, rows: Sequence[int] | np.ndarray) -> list[Pair]:
        """Return the pairs behind some rows, in their order; the shards' tables are read as they are
        needed."""
        rows = np.asarray(rows, np.int64)
        found: list[Any] = [None] * len(rows)
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shard_of):
            at = np.flatnonzero(shard_of == shard)
            table = self._pairs(int(shard)).take(rows[at] - self._starts[shard])
            columns = (table[name].to_pylist() for name in ("id", "caption", "image"))
            for place, values in zip(at, zip(*columns, strict=True), strict=True):
                found[place] = Pair(*values)
        return found

    def add(
        self,
        shard: int,
        pairs: Sequence[Pair],
        text: np.ndarray,
        image: np.ndarray | None = None,
        problems: Problems | None = None,
    ) -> None:
        """Write and commit one shard; writing it again replaces it.

        Parameters
        ----------
        shard : which one, from 0.
        pairs : n pairs.
        text, image : their embeddings, [n, d]; stored with norm 1 as fp16. A store with pictures needs both.
        problems : what was skipped in the shard's share of the corpus.

        Raises
        ------
        ArtifactError
            If shapes do not fit, an embedding is not finite or zero (its pair is named), or the disk is full.
        """
        where = f"embeddings {self.path}, shard {shard}"
        tensors = {}
        given = {"text": text, **({"image": image} if self.images else {})}
        for name, table in given.items():
            table = np.asarray(table, np.float32)
            if table.shape != (len(pairs), self.dim):
                raise ArtifactError(
                    f"{where}: {name} must be [{len(pairs)}, {self.dim}], got {list(table.shape)}"
                )
            norm = np.linalg.norm(table, axis=1)
            broken = np.flatnonzero(~(np.isfinite(norm) & (norm > 0)))
            if broken.size:
                raise ArtifactError(
                    f"{where}: the {name} embedding of pair {pairs[broken[0]].id!r} is zero, NaN or Inf; run "
                    "the encoder in fp32"
                )
            tensors[name] = from_array((table / norm[:, None]).astype(np.float16))
        files = {}
        (self.path / "shards").mkdir(exist_ok=True)
        written = write_safetensors(self._file(shard, "safetensors"), tensors)
        files["safetensors"] = {"sha256": written.sha256, "bytes": written.bytes}
        pa = arrow()
        columns = {name: [getattr(pair, key) for pair in pairs] for name, key in _PAIR_FIELDS.items()}
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(
            pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns])),
            sink,
            compression="zstd",
        )
        with atomic_file(self._file(shard, "parquet")) as file:
            file.write(memoryview(sink.getvalue()))
        files["parquet"] = {"sha256": file.sha256, "bytes": file.bytes}
        self._commit_file(shard).parent.mkdir(exist_ok=True)
        write_json(self._commit_file(shard), {"rows": len(pairs), "files": files, **_listed(problems)})

    def finish(self, shards: int, problems: Problems | None = None) -> None:
        """Say that there are so many shards, all of them committed, and what the reader skipped."""
        if missing := [shard for shard in range(shards) if not self.committed(shard)]:
            raise ArtifactError(
                f"embeddings {self.path}: shard {missing[0]} of {shards} is missing; embed again"
            )
        write_json(self.path / _DONE, {"shards": shards, **_listed(problems)})

    def check(self, verify: bool = False) -> None:
        """Check that the store is complete and its files have their sizes; with ``verify``, their hashes."""
        if self.shards is None:
            raise ArtifactError(
                f"embeddings {self.path} are not complete; run the command that embeds the corpus again, it "
                "goes on where it stopped"
            )
        for shard in range(self.shards):
            for suffix, entry in self._commit(shard)["files"].items():
                file = self._file(shard, suffix)
                found = file.stat().st_size if file.is_file() else None
                if found != entry["bytes"] or (verify and sha256_file(file) != entry["sha256"]):
                    raise ArtifactError(
                        f"{file} is missing or damaged; delete {self._commit_file(shard)} and "
                        f"{self.path / _DONE}, and embed again"
                    )

    def _spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Shard, first and last row in it, of a range of rows."""
        starts = self._starts
        first = int(np.searchsorted(starts, start, side="right")) - 1
        spans = []
        for shard in range(first, len(starts) - 1):
            if starts[shard] >= stop:
                break
            low, high = max(start, starts[shard]), min(stop, starts[shard + 1])
            if low < high:
                spans.append((shard, int(low - starts[shard]), int(high - starts[shard])))
        return spans

    def _tables(self, shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        # Mapped anew each time: a mapping that is dropped gives its pages back.
        refs = read_header(self._file(shard, "safetensors"))
        return refs["text"].read(), refs["image"].read() if self.images else None

    def _pairs(self, shard: int) -> Any:
        return arrow().parquet.read_table(self._file(shard, "parquet"))

    def _file(self, shard: int, suffix: str) -> Path:
        return self.path / "shards" / f"{shard:05d}.{suffix}"

    def _commit_file(self, shard: int) -> Path:
        return self.path / "commits" / f"{shard:05d}.json"

    def _commit(self, shard: int) -> dict[str, Any]:
        return read_json(self._commit_file(shard), _REMEDY)


def _listed(problems: Problems | None) -> dict[str, Any]:
    problems = problems or Problems()
    made = {"problems": dict(sorted(problems.counts.items())), "listed": problems.listed}
    # Names of files may be no text; they are quoted with what is not replaced.
    return json.loads(json.dumps(made, ensure_ascii=False).encode(errors="replace"))


_PAIR_FIELDS = {"id": "id", "caption": "caption", "image": "image_ref"}


def create_embeddings(
    path: str | Path,
    *,
    encoder: Mapping[str, Any],
    corpus: Mapping[str, Any],
    dim: int,
    images: bool,
    shard_pairs: int = SHARD,
) -> EmbeddingStore:
    """Begin a store, or return the one that was begun there with the same arguments.

    Raises
    ------
    ArtifactError
        If something else is there, or a store of another encoder, corpus or size; the sentence names which.
    """
    path = Path(path)
    if dim < 1 or shard_pairs < 1:
        raise ArtifactError(
            f"embeddings {path}: width and pairs a shard must be positive, got {dim}, {shard_pairs}"
        )
    spec = {
        "format": FORMAT,
        "version": VERSION,
        "dim": int(dim),
        "images": bool(images),
        "shard_pairs": int(shard_pairs),
        "encoder": dict(encoder),
        "corpus": dict(corpus),
    }
    begin_spec(path, _SPEC, spec, what="embeddings")
    return open_embeddings(path, complete=False)


def open_embeddings(path: str | Path, *, complete: bool = True, verify: bool = False) -> EmbeddingStore:
    """Open a store.

    Parameters
    ----------
    path : its folder.
    complete : refuse one that is not complete, or whose files are missing or cut short.
    verify : also hash every file.

    Raises
    ------
    ArtifactError
        If there is none, it is damaged, or of another version.
    """
    path = Path(path)
    data = read_spec(path, _SPEC, kind=FORMAT, version=VERSION, what="a corpus's embeddings")
    try:
        store = EmbeddingStore(
            path,
            int(data["dim"]),
            bool(data["images"]),
            int(data["shard_pairs"]),
            dict(data["encoder"]),
            dict(data["corpus"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path / _SPEC}: a field is missing or of another type ({error})") from error
    if complete:
        store.check(verify)
    return store
