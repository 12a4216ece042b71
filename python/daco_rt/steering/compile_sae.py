"""From sparse autoencoders and policies to a pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from numpy.typing import NDArray

from daco_rt.artifacts import Concept, ModelIdentity, Pack, Sae, save_pack
from daco_rt.errors import ArtifactError
from daco_rt.steering.compile import DEFAULT_POLICIES
from daco_rt.steering.policy import PolicySpec, check_specs, describe_spec, to_policies
from daco_rt.steering.tables import WEIGHTS, fill_tables, one_of, require_norms, scales_of, store_rows


def compile_sae_pack(
    sae_by_block: Mapping[int, Sae],
    path: str | Path,
    *,
    median_norm: Mapping[int, float],
    policies: Sequence[PolicySpec] = DEFAULT_POLICIES,
    default_policy: str | None = None,
    concepts: Sequence[Concept] | Mapping[int, Sequence[Concept]] | None = None,
    model: ModelIdentity | None = None,
    deadband: float = 0.0,
    gain: float = 0.0,
    boost: float = 0.0,
    gamma: float = 0.0,
    max_dose: float = 0.0,
    keep_norm: bool = False,
    dtype: Literal["fp32", "fp16", "bf16", "int8"] = "fp16",
    k_out: int = 8,
    overwrite: bool = False,
) -> Pack:
    """Compile sparse autoencoders, one a block, and policies into a pack.

    A deadband that suits pursuit can leave an SAE without effect, so here it is off and gain is 0 unless
    told otherwise: calibrate it for the SAE at hand.

    Parameters
    ----------
    sae_by_block : block → SAE, all with the same coder, k and shapes.
    path : the folder to make.
    median_norm : block → median residual norm, as a dictionary of the same model records it.
    concepts : names and labels of latents, for all blocks or block by block, in place of the SAEs' own
        annotation. A pack keeps one table: where blocks disagree, the name is that of the first block that
        has one, and the label is "neutral" unless all blocks share it. Edits follow each block's own.
    model : identity of the model, where the SAEs record none.
    policies … overwrite : as in :func:`compile_pursuit_pack`.

    Raises
    ------
    PolicyError, ArtifactError
        As :func:`compile_pursuit_pack`; also if the SAEs do not fit together or have no labels.
    """
    if not sae_by_block:
        raise ArtifactError("compile_sae_pack: no SAE given; give one for each block to steer")
    one_of("dtype", dtype, WEIGHTS)
    blocks = tuple(sorted(sae_by_block))
    first = sae_by_block[blocks[0]]
    for block in blocks:
        sae = sae_by_block[block]
        if sae.block != block:
            raise ArtifactError(f"SAE {sae.path} reads block {sae.block}, but is given for block {block}")
        same = (sae.coder, sae.k, sae.encoder.shape)
        if same != (first.coder, first.k, first.encoder.shape):
            raise ArtifactError(
                f"SAE {sae.path} has coder, k, [m, d] {same}, SAE {first.path} has "
                f"{(first.coder, first.k, first.encoder.shape)}; one pack needs them equal"
            )
    require_norms(median_norm, blocks)
    labelled = _labels(sae_by_block, concepts)
    specs = check_specs(
        policies,
        labelled,
        {
            "deadband": deadband,
            "gain": gain,
            "boost": boost,
            "gamma": gamma,
            "max_dose": max_dose,
            "keep_norm": keep_norm,
        },
    )
    operands = {}
    for block, sae in sorted(sae_by_block.items()):
        enc, dec = store_rows(sae.encoder, dtype), store_rows(sae.decoder, dtype)
        big: dict[str, NDArray] = {"enc": enc.rows, "enc_bias": sae.enc_bias, "dec": dec.rows}
        big |= scales_of(enc, dec)
        if sae.threshold is not None:
            big["threshold"] = sae.threshold
        operands[block] = big | fill_tables(specs, labelled[block], dec.exact, float(median_norm[block]))
    return save_pack(
        path,
        model=_identity(model, sae_by_block),
        op="sae",
        coder=first.coder,
        k=1 if first.k is None else first.k,
        k_out=k_out,
        operands=operands,
        policies=to_policies(specs, blocks),
        default_policy=specs[0].name if default_policy is None else default_policy,
        concepts=_one_table(labelled),
        median_norm={block: float(median_norm[block]) for block in blocks},
        recipe={
            "method": "sae",
            "saes": {str(block): sae_by_block[block].path.name for block in blocks},
            "policies": [describe_spec(spec) for spec in specs],
        },
        overwrite=overwrite,
    )


def _labels(
    sae_by_block: Mapping[int, Sae], concepts: Sequence[Concept] | Mapping[int, Sequence[Concept]] | None
) -> dict[int, Sequence[Concept]]:
    labelled: dict[int, Sequence[Concept]] = {}
    for block, sae in sae_by_block.items():
        if concepts is None:
            table: Sequence[Concept] = sae.annotation
        else:
            table = concepts.get(block, ()) if isinstance(concepts, Mapping) else concepts
        if not table:
            raise ArtifactError(
                f"SAE {sae.path} of block {block} has no labelled latents; annotate it, or pass concepts"
            )
        worst = max(concept.index for concept in table)
        if worst >= len(sae.decoder) or min(concept.index for concept in table) < 0:
            raise ArtifactError(
                f"SAE {sae.path}: concepts name latent {worst}, it has {len(sae.decoder)}; use 0 to "
                f"{len(sae.decoder) - 1}"
            )
        labelled[block] = table
    return labelled


def _one_table(labelled: Mapping[int, Sequence[Concept]]) -> list[Concept]:
    """Merge the blocks' tables into the one that a pack keeps for reading."""
    merged: dict[int, Concept] = {}
    for block in sorted(labelled):
        for concept in labelled[block]:
            known = merged.setdefault(concept.index, concept)
            if known.label != concept.label:
                merged[concept.index] = Concept(known.index, known.name, "neutral", known.group, known.synset)
    return [merged[index] for index in sorted(merged)]


def _identity(model: ModelIdentity | None, saes: Mapping[int, Sae]) -> ModelIdentity:
    recorded = [sae for _, sae in sorted(saes.items()) if sae.model is not None]
    if model is None and not recorded:
        raise ArtifactError("compile_sae_pack: the SAEs do not say which model they are for; pass model")
    identity = model if model is not None else recorded[0].model
    assert identity is not None
    for sae in recorded:
        assert sae.model is not None
        difference = sae.model.difference(identity)
        if difference:
            raise ArtifactError(f"SAE {sae.path} is of another model: {difference}")
    return identity
