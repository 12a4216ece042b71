"""Concept means on disk: what a model's residual stream is on average where each concept is said.

::

    means/means.json                 model, blocks, position, norms, number of shards, what was read
    means/concepts.jsonl             row i names concept i
    means/ordinary.safetensors       block.{ℓ} [d]: the mean of ordinary text
    means/shards/00007.safetensors   of each block and sign: mean [n, d], count [n], spread [n]
    means/commits/00007.json         written when shard 7 is whole; counts what was skipped and rejected

Shards are *by concept*: all stimuli of one fixed range of concepts, of both signs, make one shard. So a shard
alone gives the finished means of its concepts: no running sum is ever saved, memory does not grow with the
number of stimuli, and a harvest that was killed goes on to the same bytes. Any process can make any shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt._files import atomic_directory, sha256_file, write_json
from daco_rt.artifacts import Concept, ModelIdentity, from_array, read_header, write_safetensors
from daco_rt.artifacts.concept import check_concepts, concept_rows, read_concepts
from daco_rt.artifacts.shards import Shards, as_stored, read_spec, refuse_other
from daco_rt.errors import ArtifactError

FORMAT, VERSION = "daco_rt.means", 1
SIGNS = {1: "positive", -1: "negative"}
_SPEC, _CONCEPTS, _ORDINARY, _WHAT = "means.json", "concepts.jsonl", "ordinary.safetensors", "means"


@dataclass(frozen=True, eq=False)
class Ordinary:
    """The stream over ordinary text: block → mean [d] fp32, block → median norm, and, where pictures are
    read, block → median norm over image tokens."""

    mean: dict[int, np.ndarray]
    median_norm: dict[int, float]
    image_norm: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ShardMeans:
    """The finished means of one shard's n concepts.

    ``mean[block, sign]`` is [n, d] fp32, ``count[block, sign]`` [n] int64, ``spread[block, sign]`` [n] fp32
    the mean squared distance of the readings from their mean. ``rejected`` counts positions of outlying norm
    by block, ``skipped`` stimuli by reason, ``problems`` lists unusable stimuli by id and reason.
    """

    mean: dict[tuple[int, int], np.ndarray]
    count: dict[tuple[int, int], np.ndarray]
    spread: dict[tuple[int, int], np.ndarray]
    stimuli: int
    rejected: dict[int, int]
    skipped: dict[str, int]
    problems: list[dict[str, str]]


@dataclass(frozen=True, eq=False)
class ConceptMeans:
    """Means of N concepts, complete or being filled.

    ``model`` is the identity of the model that was read, ``blocks`` whose outputs, ``concepts[i]`` names row
    i, ``position`` says where in a stimulus it was read, ``median_norm`` is the block's median norm over
    ordinary text, ``image_norm`` that over image tokens where pictures were read, ``signs`` is (1,) or
    (1, -1), ``recipe`` what was read and how.

    Example
    -------
    >>> means = open_means("means/smol")
    >>> means.mean(16).shape == (len(means.concepts), means.dim)
    True
    """

    path: Path
    model: ModelIdentity
    blocks: tuple[int, ...]
    concepts: tuple[Concept, ...]
    position: str
    median_norm: dict[int, float]
    image_norm: dict[int, float]
    signs: tuple[int, ...]
    concepts_per_shard: int
    recipe: dict[str, Any] = field(repr=False)
    shards: Shards = field(repr=False)

    @property
    def dim(self) -> int:
        """Return d, the width of the residual stream."""
        return self.model.hidden_size

    @property
    def missing(self) -> list[int]:
        """Return the shards that are not there yet."""
        return self.shards.missing

    def mean(self, block: int, sign: int = 1) -> np.ndarray:
        """Assemble the means of a block, [N, d] fp32; rows without a reading are zeros.

        Costs the memory of its result. With ``sign=-1`` the mean over X⁻.

        Raises
        ------
        ArtifactError
            If there is no such block, or a shard is damaged.
        """
        return self._assemble("mean", block, sign, np.dtype(np.float32), (self.dim,))

    def count(self, block: int, sign: int = 1) -> np.ndarray:
        """Return how many readings are behind each mean, [N] int64."""
        return self._assemble("count", block, sign, np.dtype(np.int64), ())

    def spread(self, block: int, sign: int = 1) -> np.ndarray:
        """Return the mean squared distance of the readings from their mean, [N] fp32."""
        return self._assemble("spread", block, sign, np.dtype(np.float32), ())

    def ordinary(self, block: int) -> np.ndarray:
        """Return the mean of ordinary text at a block, [d] fp32."""
        self._check_block(block)
        return np.array(read_header(self.path / _ORDINARY)[f"block.{block}"].read())

    def rejected(self, block: int) -> int:
        """Return how many positions of a block were left out for their norm."""
        self._check_block(block)
        return self.shards.total("rejected", str(block))

    @property
    def stimuli(self) -> int:
        """Return how many stimuli the finished shards had, used or not."""
        return self.shards.total("stimuli")

    @property
    def skipped(self) -> dict[str, int]:
        """Return reason → number of stimuli that gave no reading."""
        counts: Counter[str] = Counter()
        for shard in self.shards.done:
            counts.update(self.shards.facts(shard)["skipped"])
        return dict(sorted(counts.items()))

    @property
    def problems(self) -> list[dict[str, str]]:
        """Return id and reason of every stimulus that could not be used at all."""
        return [row for shard in self.shards.done for row in self.shards.facts(shard)["problems"]]

    def rows(self, shard: int) -> range:
        """Return the concepts of a shard."""
        self.shards.check_number(shard)
        first = shard * self.concepts_per_shard
        return range(first, min(first + self.concepts_per_shard, len(self.concepts)))

    def add(self, shard: int, found: ShardMeans) -> None:
        """Write and commit one shard; writing it again replaces it by the same bytes.

        Raises
        ------
        ArtifactError
            If there is no such shard, or the disk is full.
        ValueError
            If an array has another shape.
        """
        count, files = len(self.rows(shard)), {}
        shapes = {"mean": (count, self.dim), "count": (count,), "spread": (count,)}
        tensors = {}
        for what, shape in shapes.items():
            for block in self.blocks:
                for sign in self.signs:
                    array = getattr(found, what)[block, sign]
                    if array.shape != shape:
                        raise ValueError(f"shard {shard}: {what} must be {shape}, got {array.shape}")
                    tensors[_tensor(what, block, sign)] = from_array(array)
        # Concepts without a stimulus need no file: a table may be far larger than what is read of it.
        if found.stimuli:
            file = self._file(shard)
            file.parent.mkdir(exist_ok=True)
            files[file.relative_to(self.path).as_posix()] = write_safetensors(file, tensors)
        self.shards.commit(
            shard,
            files,
            stimuli=found.stimuli,
            rejected={str(block): found.rejected.get(block, 0) for block in self.blocks},
            skipped=dict(sorted(found.skipped.items())),
            problems=found.problems,
        )

    def _assemble(
        self, what: str, block: int, sign: int, dtype: np.dtype, tail: tuple[int, ...]
    ) -> np.ndarray:
        self._check_block(block)
        if sign not in SIGNS:
            raise ValueError(f"{what}: sign must be 1 or -1, got {sign}")
        whole = np.zeros((len(self.concepts), *tail), dtype)
        if sign not in self.signs:
            return whole
        for shard in self.shards.done:
            if not self.shards.facts(shard)["files"]:
                continue
            rows, file = self.rows(shard), self._file(shard)
            ref = read_header(file).get(_tensor(what, block, sign))
            if ref is None or ref.shape != (len(rows), *tail):
                raise ArtifactError(
                    f"{file} does not hold the {what} of {len(rows)} concepts at block {block}; delete it "
                    "with its commit and harvest again"
                )
            whole[rows.start : rows.stop] = ref.read()
        return whole

    def _check_block(self, block: int) -> None:
        if block not in self.blocks:
            raise ArtifactError(
                f"means {self.path} have no block {block}; available: {', '.join(map(str, self.blocks))}"
            )

    def _file(self, shard: int) -> Path:
        return self.path / "shards" / f"{shard:05d}.safetensors"


def begin_means(
    path: str | Path,
    *,
    model: ModelIdentity,
    concepts: Sequence[Concept],
    blocks: Sequence[int],
    position: str,
    signs: Sequence[int],
    concepts_per_shard: int,
    recipe: Mapping[str, Any],
    ordinary: Callable[[], Ordinary],
    overwrite: bool = False,
) -> ConceptMeans:
    """Begin a folder of means, or return the one that was begun there with the same arguments.

    Parameters
    ----------
    path : the folder to make.
    model : identity of the model that is read.
    concepts : the table; row i must have index i.
    blocks : whose outputs are read.
    position : the rule by which positions are chosen.
    signs : (1,), or (1, -1) if there are negatives.
    concepts_per_shard : concepts behind one shard.
    recipe : what is read, any JSON; a folder with another recipe is not continued.
    ordinary : called for the ordinary text's statistics, only if the folder is new.
    overwrite : replace means that are there, whatever they are of.

    Raises
    ------
    ArtifactError
        If something else is there, or the arguments are out of range.
    """
    path, wanted = Path(path), sorted({int(block) for block in blocks})
    if not concepts or not wanted or concepts_per_shard < 1:
        raise ArtifactError(
            f"means {path}: need concepts, blocks and a positive concepts_per_shard, got {len(concepts)} "
            f"concepts, blocks {wanted} and {concepts_per_shard}"
        )
    check_concepts(concepts, len(concepts), path)
    if [concept.index for concept in concepts] != list(range(len(concepts))):
        raise ArtifactError(f"means {path}: concepts must come in order of their index, from 0 on")
    lines = (json.dumps(row, ensure_ascii=False) for row in concept_rows(concepts))
    table = "".join(f"{line}\n" for line in lines).encode()
    spec = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.to_dict(),
        "blocks": wanted,
        "position": position,
        "signs": sorted({int(sign) for sign in signs} | {1}, reverse=True),
        "concepts": {"file": _CONCEPTS, "number": len(concepts), "sha256": hashlib.sha256(table).hexdigest()},
        "concepts_per_shard": int(concepts_per_shard),
        "shards": -(-len(concepts) // concepts_per_shard),
        "recipe": dict(recipe),
    }
    spec = as_stored(spec)
    begun = (path / _SPEC).is_file()
    if not begun or overwrite:
        if path.exists() and not begun and (not path.is_dir() or any(path.iterdir())):
            raise ArtifactError(f"{path} is not empty and holds no means; choose another folder")
        _write_folder(path, spec, table, ordinary(), replace=begun)
    refuse_other(path, _WHAT, _read_spec(path), spec)
    return open_means(path, complete=False)


def _write_folder(path: Path, spec: dict[str, Any], table: bytes, ordinary: Ordinary, replace: bool) -> None:
    """Make the folder in one step, so that a kill leaves none or one that can be filled."""
    norms: dict[str, dict[str, float]] = {}
    for name in ("median_norm", "image_norm"):
        norms[name] = {str(block): float(norm) for block, norm in getattr(ordinary, name).items()}
        if not all(0 < norm < np.inf for norm in norms[name].values()):
            raise ArtifactError(f"means {path}: {name} must be positive at each block, got {norms[name]}")
    if path.is_dir() and not replace:
        os.rmdir(path)  # empty, as was checked
    with atomic_directory(path, overwrite=replace) as folder:
        (folder / _CONCEPTS).write_bytes(table)
        write_safetensors(
            folder / _ORDINARY,
            {f"block.{b}": from_array(mean.astype(np.float32)) for b, mean in ordinary.mean.items()},
        )
        sha256 = sha256_file(folder / _ORDINARY)
        write_json(folder / _SPEC, {**spec, **norms, "ordinary": {"file": _ORDINARY, "sha256": sha256}})


def _read_spec(path: Path) -> dict[str, Any]:
    return read_spec(path, _SPEC, kind=FORMAT, version=VERSION, what="concept means")


def open_means(path: str | Path, *, complete: bool = True, verify: bool = False) -> ConceptMeans:
    """Open means that were harvested.

    Parameters
    ----------
    path : their folder.
    complete : refuse a folder whose shards are not all there, or are cut short.
    verify : also hash every file.

    Raises
    ------
    ArtifactError
        If there is none, it is damaged, or of a newer version.

    Example
    -------
    >>> open_means("means/smol").missing
    []
    """
    path = Path(path)
    data = _read_spec(path)
    try:
        concepts = read_concepts(path / _CONCEPTS, int(data["concepts"]["number"]))
        norms = [{int(b): float(n) for b, n in data[name].items()} for name in ("median_norm", "image_norm")]
        found = ConceptMeans(
            path,
            ModelIdentity.from_dict(data["model"], str(path / _SPEC)),
            tuple(int(block) for block in data["blocks"]),
            concepts,
            str(data["position"]),
            norms[0],
            norms[1],
            tuple(int(sign) for sign in data["signs"]),
            int(data["concepts_per_shard"]),
            dict(data["recipe"]),
            Shards(path, int(data["shards"]), _WHAT),
        )
        hashes = {part["file"]: part["sha256"] for part in (data["concepts"], data["ordinary"])}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path / _SPEC}: a field is missing or of another type ({error})") from error
    for name, sha256 in hashes.items():
        if not (path / name).is_file() or sha256_file(path / name) != sha256:
            raise ArtifactError(f"{path / name} is missing or damaged; restore it or harvest again")
    if complete:
        found.shards.check(verify)
    return found


def _tensor(what: str, block: int, sign: int) -> str:
    return f"block.{block}.{SIGNS[sign]}.{what}"
