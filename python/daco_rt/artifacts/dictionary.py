"""The concept dictionary: one direction a concept and block, centred on the mean of ordinary text.

A folder of ``manifest.json``, ``dictionary.safetensors`` (``block.{ℓ}.atoms`` [N, d], ``block.{ℓ}.mean``
[d]) and ``concepts.jsonl``, whose row i names atom i of every block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.artifacts.concept import Concept, check_concepts, concept_rows, read_concepts
from daco_rt.artifacts.identity import ModelIdentity
from daco_rt.artifacts.manifest import MANIFEST, Progress, open_artifact
from daco_rt.artifacts.operands import DTYPE_LABELS, check_norms, check_values
from daco_rt.artifacts.store import check_target, new_artifact
from daco_rt.artifacts.tensors import TensorRef, TensorSource, dtype_name, from_array, read_header
from daco_rt.errors import ArtifactError, did_you_mean

TENSORS = "dictionary.safetensors"
CONCEPTS = "concepts.jsonl"


@dataclass(frozen=True, eq=False)
class ConceptDictionary:
    """A loaded dictionary.

    ``size`` is N, ``dim`` is d, ``concepts[i]`` names row i, ``dtype`` is "fp32" or "fp16".

    Example
    -------
    >>> dictionary = load_dictionary("dictionaries/smol")
    >>> dictionary.atoms(15)[dictionary.index("dagger")].shape == (dictionary.dim,)
    True
    """

    path: Path
    size: int
    dim: int
    dtype: str
    blocks: tuple[int, ...]
    model: ModelIdentity
    median_norm: dict[int, float]
    concepts: tuple[Concept, ...]
    recipe: dict[str, Any]
    refs: Mapping[str, TensorRef] = field(repr=False)

    def atoms(self, block: int) -> np.ndarray:
        """Map the atoms of a block, [N, d] fp32 or fp16, read-only."""
        return self._ref(block, "atoms").read()

    def mean(self, block: int) -> np.ndarray:
        """Map the mean residual of ordinary text at a block, [d] fp32, read-only."""
        return self._ref(block, "mean").read()

    def index(self, name: str) -> int:
        """Return the row of a concept by name.

        Raises
        ------
        ArtifactError
            If no concept has that name.
        """
        for concept in self.concepts:
            if concept.name == name:
                return concept.index
        raise ArtifactError(
            f"dictionary {self.path} has no concept '{name}' among its {self.size}"
            + did_you_mean(name, (concept.name for concept in self.concepts))
        )

    def _ref(self, block: int, what: str) -> TensorRef:
        if block not in self.blocks:
            raise ArtifactError(
                f"dictionary {self.path} has no block {block}; available: {', '.join(map(str, self.blocks))}"
            )
        return self.refs[f"block.{block}.{what}"]


def save_dictionary(
    path: str | Path,
    *,
    model: ModelIdentity,
    atoms: Mapping[int, np.ndarray | TensorSource],
    means: Mapping[int, np.ndarray],
    median_norm: Mapping[int, float],
    concepts: Iterable[Concept],
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ConceptDictionary:
    """Check everything, write a dictionary in one step and return it.

    Parameters
    ----------
    path : the folder to make.
    atoms : block → [N, d], fp32 or fp16, one dtype and shape for all blocks; or (dtype, shape, producer) as
        ``write_safetensors`` takes it, so that one block is in memory at a time.
    means : block → [d] fp32.
    median_norm : block → median norm of the residual stream.
    concepts : N concepts with indices 0 to N − 1, in order.
    recipe : how the directions were made, any JSON; it is read after the last producer has run, which may
        therefore add to it.

    Raises
    ------
    ArtifactError
        If shapes, dtypes or blocks do not fit, a value is not finite, or the folder may not be written.
    """
    where = f"dictionary {path}"
    check_target(path, overwrite=overwrite)
    tensors: dict[str, np.ndarray | TensorSource] = {f"block.{b}.atoms": a for b, a in atoms.items()}
    tensors |= {f"block.{b}.mean": a for b, a in means.items()}
    blocks = tuple(sorted(int(block) for block in atoms))
    specs = {name: _spec(given) for name, given in tensors.items()}
    size, dim, dtype = _check(blocks, specs, where)
    sources = {name: _checked(name, given, where) for name, given in tensors.items()}
    table = _check_table(concepts, size, where)
    norms = check_norms(median_norm, blocks, where)
    with new_artifact(path, "dictionary", overwrite=overwrite) as writer:
        writer.write_safetensors(TENSORS, sources)
        writer.set(
            model=model.to_dict(), size=size, dim=dim, dtype=dtype, blocks=blocks,
            median_norm=norms, recipe=dict(recipe or {}),
        )  # fmt: skip
        writer.add_jsonl(CONCEPTS, concept_rows(table))
    return load_dictionary(path, verify=False)


def load_dictionary(
    path: str | Path, verify: bool = True, progress: Progress | None = None
) -> ConceptDictionary:
    """Open a dictionary and check it; with ``verify`` every file is hashed and every value must be finite.

    Raises
    ------
    ArtifactError
        If a file is missing, damaged, of a newer version, or its parts do not fit together.
    """
    artifact = open_artifact(path, "dictionary", verify=verify, progress=progress)
    path, data = artifact.path, artifact.manifest
    where = str(path / MANIFEST)
    try:
        blocks = tuple(int(block) for block in data["blocks"])
        norms = check_norms({int(key): norm for key, norm in data["median_norm"].items()}, blocks, where)
        identity, recipe = data["model"], dict(data["recipe"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{where}: a field is missing or of another type ({error}); make it again"
        ) from error
    refs = read_header(artifact.file(TENSORS))
    where = str(path / TENSORS)
    size, dim, dtype = _check(blocks, {name: (ref.dtype, ref.shape) for name, ref in refs.items()}, where)
    if verify:
        for name, ref in refs.items():
            check_values(name, ref.read(), where)
    concepts = _check_table(read_concepts(artifact.file(CONCEPTS), size), size, str(path / CONCEPTS))
    model = ModelIdentity.from_dict(identity, str(path / MANIFEST))
    return ConceptDictionary(path, size, dim, dtype, blocks, model, norms, concepts, recipe, refs)


def _spec(given: np.ndarray | TensorSource) -> tuple[str, tuple[int, ...]]:
    return (dtype_name(given), tuple(given.shape)) if isinstance(given, np.ndarray) else given[:2]


def _checked(name: str, given: np.ndarray | TensorSource, where: str) -> TensorSource:
    """Return a source whose values are finite: arrays are checked now, what is made later when it is made."""
    if isinstance(given, np.ndarray):
        check_values(name, given, where)
        return from_array(given)
    dtype, shape, producer = given

    def produce() -> Iterator[np.ndarray]:
        made = producer()
        for rows in [made] if isinstance(made, np.ndarray) else made:
            check_values(name, rows, where)
            yield rows

    return dtype, shape, produce


def _check(
    blocks: tuple[int, ...], specs: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> tuple[int, int, str]:
    """Return N, d and the dtype's label after checking names, dtypes and shapes."""
    expected = {f"block.{block}.{what}" for block in blocks for what in ("atoms", "mean")}
    odd = sorted(expected ^ specs.keys())
    if odd or not blocks:
        raise ArtifactError(
            f"{where}: every block needs atoms and a mean and nothing else; "
            + (
                f"'{odd[0]}' is {'missing' if odd[0] in expected else 'unknown'}"
                if odd
                else "there is no block"
            )
        )
    dtype, shape = specs[f"block.{blocks[0]}.atoms"]
    if dtype not in ("F32", "F16") or len(shape) != 2 or 0 in shape:
        raise ArtifactError(
            f"{where}: atoms must be an fp32 or fp16 matrix with elements, got {dtype} {list(shape)}"
        )
    for name, spec in specs.items():
        wanted = (dtype, shape) if name.endswith(".atoms") else ("F32", shape[1:])
        if spec != wanted:
            raise ArtifactError(
                f"{where}: '{name}' must be {wanted[0]} {list(wanted[1])}, got {spec[0]} {list(spec[1])}"
            )
    return shape[0], shape[1], DTYPE_LABELS[dtype]


def _check_table(concepts: Iterable[Concept], size: int, where: str) -> tuple[Concept, ...]:
    table = check_concepts(concepts, size, where)
    if [concept.index for concept in table] != list(range(size)):
        raise ArtifactError(
            f"{where}: there must be one concept for each of the {size} atoms, in order, got {len(table)} "
            "concepts"
        )
    return table
