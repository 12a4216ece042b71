"""The activation store: rows of the residual stream on disk, a set of shards for each block.

::

    store/store.json                 model, blocks, dtype, number of shards, what was read
    store/block-015/00007.safetensors    rows [n, d], text [n], token [n] (int32)
    store/commits/00007.json         written when shard 7 lies there for every block

A shard is the rows of one fixed share of the stimuli, so it can be made alone, again, or by another process,
and comes out the same. Every file is written in one step; a shard counts once its commit exists.
Row 0 of a text and rows of outlying norm never enter: they are the massive activations, a few directions
that would take the whole of the reconstruction error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from daco_rt._files import HashingFile
from daco_rt.artifacts import ModelIdentity, from_array, read_header, write_safetensors
from daco_rt.artifacts.shards import Shards, begin_spec, read_spec
from daco_rt.errors import ArtifactError

FORMAT, VERSION = "daco_rt.activations", 1
NORM_LIMIT = 4.0
DTYPES: dict[str, np.dtype] = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
_SPEC = "store.json"


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """A store, complete or being filled.

    ``dim`` is d, ``dtype`` "fp32" or "bf16" (fp16 would overflow on some models), ``median_norm`` the median
    norm of each block, above ``norm_limit`` times which a row is rejected, ``shards`` how many there will be,
    ``recipe`` what was read. ``missing`` lists shards that are not there yet.

    Example
    -------
    >>> store = open_store("stores/smol")
    >>> store.chunk(16, 0).shape[1] == store.dim
    True
    """

    path: Path
    model: ModelIdentity
    dim: int
    blocks: tuple[int, ...]
    dtype: str
    median_norm: dict[int, float]
    norm_limit: float
    shards: int
    recipe: dict[str, Any] = field(repr=False)

    @property
    def missing(self) -> list[int]:
        """Return the shards that have no commit yet."""
        return self._shards.missing

    def rows(self, block: int) -> int:
        """Return how many rows the committed shards hold for a block."""
        self._check_block(block)
        return self._shards.total("rows", str(block))

    def rejected(self, block: int) -> int:
        """Return how many rows of a block were rejected for their norm."""
        self._check_block(block)
        return self._shards.total("rejected", str(block))

    def chunk(self, block: int, shard: int) -> np.ndarray:
        """Map the rows of one shard of one block, [n, d] fp32 or bf16, read-only.

        Raises
        ------
        ArtifactError
            If the store has no such block or shard, or its file is damaged.
        """
        self._check_block(block)
        file = self._shard_file(block, shard)
        if not self._shards.has(shard):
            raise ArtifactError(f"{file} is not there yet; finish filling the store {self.path}")
        refs = read_header(file)
        ref = refs.get("rows")
        if ref is None or len(ref.shape) != 2 or ref.shape[1] != self.dim:
            raise ArtifactError(f"{file} holds no rows of width {self.dim}; fill the store again")
        return ref.read()

    def origins(self, block: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return of each row in ``chunk`` the number of its text and its position in it, int32 [n] each."""
        self._check_block(block)
        refs = read_header(self._shard_file(block, shard))
        return refs["text"].read(), refs["token"].read()

    def add(
        self, shard: int, rows: Mapping[int, np.ndarray], *, text: np.ndarray, token: np.ndarray
    ) -> dict[int, int]:
        """Write and commit one shard; return how many rows of each block it holds.

        Parameters
        ----------
        shard : which one, from 0. Writing it again replaces it.
        rows : block → [n, d] fp32, for every block of the store.
        text, token : integers [n]: where each row comes from. Rows with ``token == 0`` and rows whose norm
            exceeds ``norm_limit`` × the block's median are left out.

        Raises
        ------
        ArtifactError
            If blocks or shapes do not fit, a row is not finite (its text is named), or the disk is full.
        """
        where = f"store {self.path}, shard {shard}"
        self._shards.check_number(shard)
        if set(rows) != set(self.blocks):
            raise ArtifactError(f"{where}: rows are for blocks {sorted(rows)}, expected {list(self.blocks)}")
        text, token = np.asarray(text, np.int32), np.asarray(token, np.int32)
        commit: dict[str, dict[str, int]] = {"rows": {}, "rejected": {}}
        files: dict[str, HashingFile] = {}
        for block in self.blocks:
            table = np.asarray(rows[block], np.float32)
            if table.shape != (len(text), self.dim) or token.shape != text.shape:
                raise ArtifactError(
                    f"{where}: rows of block {block} must be [{len(text)}, {self.dim}] with as many texts "
                    f"and "
                    f"tokens, got {list(table.shape)} and {len(token)} tokens"
                )
            broken = np.flatnonzero(~np.isfinite(table).all(axis=1))
            if broken.size:
                raise ArtifactError(
                    f"{where}: text {text[broken[0]]} gives NaN or Inf at block {block}, token "
                    f"{token[broken[0]]}; leave that text out, or run the model in fp32"
                )
            inside = np.linalg.norm(table, axis=1) <= self.norm_limit * self.median_norm[block]
            kept = inside & (token > 0)
            file = self._shard_file(block, shard)
            file.parent.mkdir(parents=True, exist_ok=True)
            files[file.relative_to(self.path).as_posix()] = write_safetensors(
                file,
                {
                    "rows": from_array(table[kept].astype(DTYPES[self.dtype])),
                    "text": from_array(text[kept]),
                    "token": from_array(token[kept]),
                },
            )
            commit["rows"][str(block)] = int(kept.sum())
            commit["rejected"][str(block)] = int((~inside & (token > 0)).sum())
        self._shards.commit(shard, files, **commit)
        return {block: commit["rows"][str(block)] for block in self.blocks}

    def check(self, verify: bool = False) -> None:
        """Check that the store is complete and its files have their sizes; with ``verify``, their hashes.

        Raises
        ------
        ArtifactError
            If a shard is missing, cut short or damaged.
        """
        self._shards.check(verify)

    def _check_block(self, block: int) -> None:
        if block not in self.blocks:
            raise ArtifactError(
                f"store {self.path} has no block {block}; available: {', '.join(map(str, self.blocks))}"
            )

    @property
    def _shards(self) -> Shards:
        return Shards(self.path, self.shards, "store")

    def _shard_file(self, block: int, shard: int) -> Path:
        return self.path / f"block-{block:03d}" / f"{shard:05d}.safetensors"


def create_store(
    path: str | Path,
    *,
    model: ModelIdentity,
    blocks: Sequence[int],
    median_norm: Mapping[int, float],
    shards: int,
    dtype: str = "bf16",
    norm_limit: float = NORM_LIMIT,
    recipe: Mapping[str, Any] | None = None,
) -> ActivationStore:
    """Begin a store, or return the one that was begun there with the same arguments.

    Parameters
    ----------
    path : the folder to make.
    model : identity of the model that is read; its ``hidden_size`` is the width of the rows.
    blocks : whose outputs are stored.
    median_norm : block → median norm of the residual stream.
    shards : how many there will be.
    dtype : "bf16" or "fp32".
    norm_limit : rows above this multiple of the median are rejected.
    recipe : what is read, any JSON; a store with another recipe is not continued.

    Raises
    ------
    ArtifactError
        If something else is there, or the arguments are out of range.
    """
    path = Path(path)
    wanted = sorted({int(block) for block in blocks})
    if dtype not in DTYPES:
        raise ArtifactError(f"store {path}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not wanted or wanted[0] < 0 or shards < 1 or not norm_limit > 0:
        raise ArtifactError(
            f"store {path}: needs blocks, at least one shard and a positive norm_limit, got {wanted}, "
            f"{shards} "
            f"and {norm_limit}"
        )
    norms = {str(block): float(median_norm.get(block, 0.0)) for block in wanted}
    if not all(0 < norm < np.inf for norm in norms.values()):
        raise ArtifactError(f"store {path}: median_norm must be positive at each block, got {norms}")
    spec = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.to_dict(),
        "blocks": wanted,
        "dtype": dtype,
        "median_norm": norms,
        "norm_limit": float(norm_limit),
        "shards": int(shards),
        "recipe": dict(recipe or {}),
    }
    begin_spec(path, _SPEC, spec, what="store")
    return open_store(path, complete=False)


def open_store(path: str | Path, *, complete: bool = True, verify: bool = False) -> ActivationStore:
    """Open a store.

    Parameters
    ----------
    path : its folder.
    complete : refuse one that is not complete, or whose files are missing or cut short.
    verify : also hash every file.

    Raises
    ------
    ArtifactError
        If there is none, it is damaged, or of a newer version.
    """
    path = Path(path)
    data = read_spec(path, _SPEC, kind=FORMAT, version=VERSION, what="an activation store")
    try:
        model = ModelIdentity.from_dict(data["model"], str(path / _SPEC))
        store = ActivationStore(
            path,
            model,
            model.hidden_size,
            tuple(int(block) for block in data["blocks"]),
            str(data["dtype"]),
            {int(block): float(norm) for block, norm in data["median_norm"].items()},
            float(data["norm_limit"]),
            int(data["shards"]),
            dict(data["recipe"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path / _SPEC}: a field is missing or of another type ({error})") from error
    if complete:
        store.check(verify)
    return store
