"""From policies to packs: every number that a block's operator reads is computed here.

Where the numbers come from:

- *deadband* θ = ``deadband`` × the block's median residual norm. Pursuit always finds k atoms, a good part
  of them by chance and weak; without a deadband removing those does most of the damage. 0.4 is a start:
  choose it by what harmless answers lose.
- *gain* −1: subtracting a code once often leaves enough for later blocks to restore it; twice does not.
- *bias* −E μ: residual streams share a few huge directions; coding z − μ keeps them out of the code.
- *positions* "all": attention reads a concept back from the cache of the prompt, so editing generated
  tokens alone is weaker. The first token is never edited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from daco_rt.artifacts import ConceptDictionary, ModelIdentity, Pack, save_pack
from daco_rt.errors import ArtifactError, PolicyError
from daco_rt.steering.policy import FIRST_SLOT, PolicySpec, check_specs, describe_spec, to_policies
from daco_rt.steering.tables import (
    DTYPES,
    GRAM_LIMIT,
    WEIGHTS,
    Tables,
    along,
    fill_tables,
    one_of,
    require_norms,
    scales_of,
    store_rows,
)

DEFAULT_POLICIES = (PolicySpec("default", description="removes every concept labelled undesirable"),)


def compile_pursuit_pack(
    dictionary: ConceptDictionary,
    path: str | Path,
    *,
    policies: Sequence[PolicySpec] = DEFAULT_POLICIES,
    default_policy: str | None = None,
    blocks: Sequence[int] | None = None,
    coder: Literal["omp", "elastic_net"] = "omp",
    k: int = 16,
    sign: Literal["positive", "signed", "nnls"] = "positive",
    tol: float = 0.0,
    tau: float = 0.95,
    alpha: float = 0.05,
    deadband: float = 0.4,
    gain: float = -1.0,
    boost: float = 0.0,
    gamma: float = 0.0,
    max_dose: float = 0.0,
    keep_norm: bool = False,
    centre: bool = True,
    dtype: Literal["fp32", "fp16", "bf16", "int8"] = "fp16",
    gram: Literal["auto", "none", "fp32", "fp16"] = "auto",
    k_out: int = 8,
    overwrite: bool = False,
) -> Pack:
    """Compile a concept dictionary and policies into a pack that codes by matching pursuit or an elastic net.

    Atoms are scaled to unit length, so that the largest correlation is the best match.

    Parameters
    ----------
    dictionary : the concepts' directions; its labels and groups are what policies select by.
    path : the folder to make.
    policies : by default one, "default", which removes every undesirable concept.
    default_policy : the policy of requests that name none; by default the first.
    blocks : blocks to steer; by default all of the dictionary's.
    coder : "omp" finds at most k concepts; "elastic_net" as many as its penalty leaves.
    k, sign, tol, tau, alpha : of the coder, as in :func:`daco_rt.ops.steer_pursuit`.
    deadband, gain, boost, gamma, max_dose, keep_norm : for policies that leave theirs at ``None``;
        see :class:`PolicySpec` for units.
    centre : code z − μ, μ the mean of ordinary text, instead of z.
    dtype : of the two matrices. "int8" halves what fp16 reads; scales are stored beside them.
    gram : whether atom correlations are stored: "auto" does in fp32 up to 4,096 atoms. With
        them pursuit reads the atoms once instead of k times.
    k_out : how many concepts a row reports.
    overwrite : replace an existing folder.

    Raises
    ------
    PolicyError
        A policy names a block, group or concept that does not exist, or holds a number out of range.
    ArtifactError
        The dictionary or an attribute does not fit, or the folder may not be written.

    Example
    -------
    >>> pack = compile_pursuit_pack(load_dictionary("dictionaries/smol"), "packs/smol")
    >>> pack.default_policy
    'default'
    """
    chosen = _blocks(blocks, dictionary.blocks, f"dictionary {dictionary.path}")
    one_of("dtype", dtype, WEIGHTS)
    one_of("gram", gram, ("auto", "none", "fp32", "fp16"))
    if gram == "auto":
        gram = "fp32" if dictionary.size <= GRAM_LIMIT else "none"
    specs = check_specs(
        policies,
        dict.fromkeys(chosen, dictionary.concepts),
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
    for block in chosen:
        stored = store_rows(_unit_rows(dictionary.atoms(block)), dtype)
        exact = stored.exact
        mean = np.asarray(dictionary.mean(block), np.float64) if centre else np.zeros(dictionary.dim)
        big: dict[str, NDArray] = {
            "analysis": stored.rows,
            "bias": (-(exact @ mean)).astype(np.float32),
            "atoms": stored.rows,
        }
        big |= scales_of(stored, stored)
        if gram != "none":
            wide = exact.astype(np.float32)
            big["gram"] = (wide @ wide.T).astype(DTYPES[gram])
        operands[block] = big | fill_tables(
            specs, dictionary.concepts, exact, dictionary.median_norm[block], block
        )
    return save_pack(
        path,
        model=dictionary.model,
        op="pursuit",
        coder=coder,
        k=k,
        k_out=k_out,
        sign=sign,
        tol=tol,
        tau=tau,
        alpha=alpha,
        operands=operands,
        policies=to_policies(specs, chosen),
        default_policy=specs[0].name if default_policy is None else default_policy,
        concepts=dictionary.concepts,
        median_norm={block: dictionary.median_norm[block] for block in chosen},
        recipe={
            "method": "pursuit",
            "dictionary": dictionary.path.name,
            "centre": centre,
            "policies": [describe_spec(spec) for spec in specs],
        },
        overwrite=overwrite,
    )


def compile_actadd_pack(
    direction_by_block: Mapping[int, NDArray],
    path: str | Path,
    *,
    model: ModelIdentity,
    median_norm: Mapping[int, float],
    strengths: Mapping[str, float] | None = None,
    positions: str = "all",
    max_dose: float = 0.0,
    keep_norm: bool = False,
    overwrite: bool = False,
) -> Pack:
    """Compile one direction a block into a pack that adds it (activation addition), without any code.

    Parameters
    ----------
    direction_by_block : block → [d], any length; only where it points counts.
    path : the folder to make.
    model : identity of the model.
    median_norm : block → median residual norm.
    strengths : policy → length of the shift as a fraction of the block's median norm; negative points the
        other way. By default one policy, "default", of 0.1.
    positions : of all policies.
    max_dose, keep_norm : as in :class:`PolicySpec`.

    Raises
    ------
    PolicyError, ArtifactError
        A direction is zero or of another length than the others, or a number is out of range.

    Example
    -------
    >>> compile_actadd_pack({15: refusal}, "packs/refusal", model=identity, median_norm={15: 210.0})
    """
    if not direction_by_block:
        raise ArtifactError("compile_actadd_pack: no direction given; give one for each block to steer")
    strengths = {"default": 0.1} if strengths is None else strengths
    if not strengths:
        raise PolicyError("compile_actadd_pack: strengths are empty; give one policy at least")
    blocks = tuple(sorted(direction_by_block))
    require_norms(median_norm, blocks)
    specs = [
        PolicySpec(name, positions, description="adds a direction").with_defaults(
            gain=1.0, boost=0.0, gamma=value, deadband=0.0, max_dose=max_dose, keep_norm=keep_norm
        )
        for name, value in strengths.items()
    ]
    operands = {}
    for block in blocks:
        direction = np.asarray(direction_by_block[block])
        if direction.shape != (model.hidden_size,):
            raise ArtifactError(
                f"compile_actadd_pack: the direction of block {block} must have shape [{model.hidden_size}], "
                f"got {list(direction.shape)}"
            )
        tables = Tables(FIRST_SLOT + len(specs), 1, direction.size)
        for slot, spec in enumerate(specs, FIRST_SLOT):
            assert spec.gamma is not None
            norm = float(median_norm[block])
            tables.shift[slot] = along(direction, spec.gamma * norm, f"policy '{spec.name}', block {block}")
            tables.limit(slot, spec, norm)
        # The coder "none" reads neither matrix; one row of zeros stands in for them.
        empty = np.zeros((1, direction.size), np.float32)
        operands[block] = {"enc": empty, "enc_bias": np.zeros(1, np.float32), "dec": empty} | tables.operands(
            with_boost=False
        )
    return save_pack(
        path,
        model=model,
        op="sae",
        coder="none",
        k=1,
        operands=operands,
        policies=to_policies(specs, blocks),
        default_policy=specs[0].name,
        concepts=(),
        median_norm={block: float(median_norm[block]) for block in blocks},
        recipe={"method": "actadd", "policies": [describe_spec(spec) for spec in specs]},
        overwrite=overwrite,
    )


def _unit_rows(atoms: NDArray) -> NDArray[np.float64]:
    rows = np.asarray(atoms).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def _blocks(asked: Sequence[int] | None, there: Sequence[int], what: str) -> tuple[int, ...]:
    if asked is None:
        return tuple(there)
    missing = sorted(set(asked) - set(there))
    if missing or not asked:
        got = f"block {missing[0]}" if missing else "no block"
        raise PolicyError(f"{got} asked for; {what} has {', '.join(map(str, there))}")
    return tuple(sorted(set(asked)))
