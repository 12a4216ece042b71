"""The atoms of anything that keeps them, by name: dictionaries, packs, bundles' packs, annotated SAEs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from daco_rt.artifacts import Concept, load_bundle, load_dictionary, load_pack, load_sae
from daco_rt.artifacts.describe import describe
from daco_rt.dictionary.diagnostics import Neighbour, nearest
from daco_rt.errors import ArtifactError, did_you_mean
from daco_rt.ops.quantise import scaled


@dataclass(frozen=True)
class NamedAtoms:
    """The atoms of one block [m, d] (an SAE's are its decoder's rows) and the concepts that name some."""

    path: Path
    block: int
    atoms: np.ndarray = field(repr=False)
    concepts: tuple[Concept, ...] = field(repr=False)

    def nearest(self, name: str, *, count: int = 10) -> tuple[Neighbour, ...]:
        """Return the named atoms nearest to that of a concept; where several bear its name, to the first.

        Raises
        ------
        ArtifactError
            If no concept has that name; the nearest spelling is said.
        """
        for concept in self.concepts:
            if concept.name == name:
                return nearest(self.atoms, self.concepts, concept.index, count=count)
        names = {concept.name for concept in self.concepts}
        raise ArtifactError(f"{self.path} has no concept '{name}'{did_you_mean(name, names)}")


def open_atoms(path: str | Path, *, block: int | None = None) -> NamedAtoms:
    """Open the atoms of a dictionary, pack, bundle or SAE at a block, by default its middle one.

    Raises
    ------
    ArtifactError
        If the folder keeps no atoms by name, or has no such block.

    Example
    -------
    >>> open_atoms("dictionaries/smol", block=16).nearest("dagger", count=3)[0].concept.name
    'sword'
    """
    path = Path(path)
    kind = describe(path)["kind"]
    if kind == "dictionary":
        dictionary = load_dictionary(path, verify=False)
        chosen = _block(path, dictionary.blocks, block)
        return NamedAtoms(path, chosen, dictionary.atoms(chosen), dictionary.concepts)
    if kind == "sae":
        sae = load_sae(path, verify=False)
        return NamedAtoms(path, _block(path, (sae.block,), block), sae.decoder, _named(path, sae.annotation))
    pack = load_bundle(path, verify=False).pack() if kind == "bundle" else None
    if kind == "pack":
        pack = load_pack(path, verify=False)
    if pack is None:
        raise ArtifactError(
            f"{path} is a {kind} without atoms; give a dictionary, an SAE, a pack or a bundle"
        )
    matrix = {"pursuit": "atoms", "sae": "dec"}.get(pack.op)
    if matrix is None:
        raise ArtifactError(f"{path} is a pack of {pack.op} edits, which keep no atoms; give its dictionary")
    chosen = _block(path, pack.blocks, block)
    operands = pack.operands(chosen)
    atoms = scaled(operands[matrix], operands.get("scales"), 1)
    return NamedAtoms(path, chosen, atoms, _named(path, pack.concepts))


def _block(path: Path, blocks: tuple[int, ...], block: int | None) -> int:
    if block is None:
        return blocks[len(blocks) // 2]
    if block not in blocks:
        raise ArtifactError(f"{path} has no block {block}; available: {', '.join(map(str, blocks))}")
    return block


def _named(path: Path, concepts: tuple[Concept, ...]) -> tuple[Concept, ...]:
    if not concepts:
        raise ArtifactError(f"{path} names none of its atoms; label it first: daco-rt annotate {path}")
    return concepts
