"""The pack: everything the steering operator needs for the blocks it steers, and the policies by name.

A folder of ``manifest.json``, ``steering.safetensors`` (tensors ``block.{ℓ}.{operand}`` and ``slot_map``) and
``concepts.jsonl``. One pack has one op, coder and k for all its blocks; operands are those of
``operands.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.artifacts.concept import Concept, check_concepts, concept_rows, read_concepts
from daco_rt.artifacts.identity import ModelIdentity
from daco_rt.artifacts.manifest import MANIFEST, Progress, open_artifact
from daco_rt.artifacts.operands import (
    DTYPE_LABELS,
    EMPTY_WHEN_ABSENT,
    OPERANDS,
    Sizes,
    check_attributes,
    check_k,
    check_norms,
    check_specs,
    check_values,
)
from daco_rt.artifacts.policy import BUILT_IN, Policy, check_policies, check_slot_map, make_slot_map
from daco_rt.artifacts.store import check_target, new_artifact
from daco_rt.artifacts.tensors import TensorRef, TensorSource, dtype_name, from_array, read_header
from daco_rt.errors import ArtifactError, PolicyError, did_you_mean

STEERING = "steering.safetensors"
CONCEPTS = "concepts.jsonl"

# What a graph bakes in; the rest of a pack may be swapped under it.
_SIGNATURE = (
    *("op", "coder", "k", "k_out", "sign", "tol", "tau", "alpha"),
    *("dim", "atoms", "slots_count", "dtype", "blocks"),
)


@dataclass(frozen=True, eq=False)
class Pack:
    """A loaded pack. Operands stay on disk until ``operands`` maps them.

    ``dim`` is d, ``atoms`` is m (or N), ``slots_count`` is P, slots 0 (off) and 1 (observe) included;
    ``slot_map`` int32 [len(blocks), P] is the slot that each block sees; ``median_norm`` the block's median
    residual norm, from which deadbands were derived; ``dtype`` of the two matrices "fp32", "fp16", "bf16" or
    "int8" (with operand ``scales``).

    Example
    -------
    >>> pack = load_pack("packs/smol")
    >>> pack.operands(pack.blocks[0])["gain"].shape == (pack.slots_count, pack.atoms)
    True
    """

    path: Path
    op: str
    coder: str
    k: int
    k_out: int
    sign: str
    tol: float
    tau: float
    alpha: float
    dim: int
    atoms: int
    slots_count: int
    dtype: str
    blocks: tuple[int, ...]
    model: ModelIdentity
    policies: tuple[Policy, ...]
    default_policy: str
    slot_map: np.ndarray
    median_norm: dict[int, float]
    concepts: tuple[Concept, ...]
    recipe: dict[str, Any]
    refs: Mapping[int, Mapping[str, TensorRef]] = field(repr=False)

    def policy(self, name: str) -> Policy:
        """Return a policy by name; "off" (slot 0) and "observe" (slot 1) always exist.

        Raises
        ------
        PolicyError
            If there is no such policy; near matches are named.
        """
        for policy in self.policies:
            if policy.name == name:
                return policy
        if name in BUILT_IN:
            return Policy(name, BUILT_IN.index(name), "all", self.blocks)
        known = (*BUILT_IN, *(policy.name for policy in self.policies))
        raise PolicyError(f"unknown policy '{name}' of pack {self.path}{did_you_mean(name, known)}")

    def operands(self, block: int) -> dict[str, np.ndarray]:
        """Map the operands of one block, keyed by the operator contract's names, in its order.

        Arrays are read-only views of the file, bf16 as ``ml_dtypes.bfloat16``. ``threshold`` and ``boost``
        are empty fp32 arrays where the pack has none; ``gram`` is left out.

        Raises
        ------
        PolicyError
            If the pack does not steer that block.
        """
        self._require((block,))
        refs = self.refs[block]
        return {
            name: refs[name].read() if name in refs else np.empty(0, np.float32)
            for name in OPERANDS[self.op]
            if name in refs or name in EMPTY_WHEN_ABSENT
        }

    def check_values(self) -> None:
        """Read every operand once and refuse NaN, Inf and broken flags, as ``load_pack`` does by default.

        Raises
        ------
        ArtifactError
            The sentence names the block, the operand and the place.
        """
        for block, refs in self.refs.items():
            for name, ref in refs.items():
                check_values(name, ref.read(), f"{ref.file}, block {block}")

    def concept(self, index: int) -> Concept | None:
        """Return the concept behind an atom, or None if that atom has no name."""
        return self._by_index.get(index)

    def signature(self) -> dict[str, Any]:
        """Return what an exported graph depends on beside the tensors' layout, as plain JSON values."""
        values = {name: getattr(self, name) for name in _SIGNATURE}
        return {**values, "blocks": list(self.blocks)}

    def select_blocks(self, blocks: Iterable[int]) -> Pack:
        """Return a view of fewer blocks. Policies keep their slots; those left without a block are dropped.

        Raises
        ------
        PolicyError
            If a block is not in the pack, none is asked for, or the default policy would lose its last block.
        """
        chosen = tuple(sorted(set(blocks)))
        self._require(chosen)
        if not chosen:
            raise PolicyError(f"pack {self.path}: no block chosen; available: {_join(self.blocks)}")
        policies = tuple(
            dataclasses.replace(policy, blocks=kept)
            for policy in self.policies
            if (kept := tuple(block for block in policy.blocks if block in chosen))
        )
        if self.default_policy not in (*BUILT_IN, *(policy.name for policy in policies)):
            raise PolicyError(
                f"pack {self.path}: the default policy '{self.default_policy}' steers only blocks "
                f"{_join(self.policy(self.default_policy).blocks)}, none of them among {_join(chosen)}; "
                "choose others"
            )
        rows = [self.blocks.index(block) for block in chosen]
        return dataclasses.replace(
            self,
            blocks=chosen,
            policies=policies,
            slot_map=self.slot_map[rows],
            median_norm={block: self.median_norm[block] for block in chosen},
            refs={block: self.refs[block] for block in chosen},
        )

    def save_to(self, path: str | Path, *, overwrite: bool = False) -> Pack:
        """Write this pack, or the view of it that this is, into another folder and return that pack.

        Raises
        ------
        ArtifactError
            As ``save_pack``.
        """
        return save_pack(
            path,
            model=self.model,
            op=self.op,
            coder=self.coder,
            k=self.k,
            k_out=self.k_out,
            sign=self.sign,
            tol=self.tol,
            tau=self.tau,
            alpha=self.alpha,
            operands={block: self.operands(block) for block in self.blocks},
            policies=self.policies,
            default_policy=self.default_policy,
            slot_map=self.slot_map,
            median_norm=self.median_norm,
            concepts=self.concepts,
            recipe=self.recipe,
            overwrite=overwrite,
        )

    @functools.cached_property
    def _by_index(self) -> dict[int, Concept]:
        return {concept.index: concept for concept in self.concepts}

    def _require(self, blocks: Iterable[int]) -> None:
        missing = sorted(set(blocks) - set(self.blocks))
        if missing:
            raise PolicyError(
                f"pack {self.path} has no block {_join(missing)}; available: {_join(self.blocks)}"
            )


def save_pack(
    path: str | Path,
    *,
    model: ModelIdentity,
    op: str,
    coder: str,
    k: int,
    operands: Mapping[int, Mapping[str, np.ndarray]],
    policies: Iterable[Policy],
    default_policy: str,
    concepts: Iterable[Concept],
    median_norm: Mapping[int, float],
    k_out: int = 0,
    sign: str = "positive",
    tol: float = 0.0,
    tau: float = 0.95,
    alpha: float = 0.05,
    slot_map: np.ndarray | None = None,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Pack:
    """Check everything, write a pack in one step and return it.

    Parameters
    ----------
    path : the folder to make.
    operands : block → operand → array. sae: enc [m, d], enc_bias [m], dec [m, d], threshold [m], gain, boost,
        undesirable [P, m], shift [P, d], limits [P, 4]; pursuit: analysis [N, d], bias [N], gram [N, N],
        atoms [N, d] and the rest as before; affine: a [P, r, d], a_bias [P, r], b [P, d, r], shift, limits.
        threshold, boost and gram may be absent or empty. Matrices fp32,
        fp16, ``ml_dtypes.bfloat16`` or int8 with scales [2, m] (row 0 of enc or analysis, row 1 of dec or
        atoms); gram fp32 or fp16, undesirable bool, the rest fp32.
    policies, default_policy : the named slots; the default may also be "off" or "observe".
    median_norm : block → median norm of the residual stream.
    slot_map : int32 [blocks, P]; by default a policy sees its own slot in its blocks and 0 elsewhere.
    recipe : how the pack was made, any JSON.

    Raises
    ------
    ArtifactError, PolicyError
        If anything does not fit or is not finite, the folder exists and ``overwrite`` is False, or the device
        refuses the data. Nothing is written then.
    """
    where = f"pack {path}"
    check_target(path, overwrite=overwrite)
    attributes: dict[str, Any] = {
        "op": op, "coder": coder, "k": k, "k_out": k_out, "sign": sign, "tol": tol, "tau": tau, "alpha": alpha
    }  # fmt: skip
    check_attributes(**attributes, where=where)
    blocks = _check_blocks(tuple(sorted(operands)), where)
    filled = {block: {name: a for name, a in operands[block].items() if a.size} for block in blocks}
    specs = {
        block: {name: (dtype_name(array), array.shape) for name, array in arrays.items()}
        for block, arrays in filled.items()
    }
    sizes = _check_all(op, coder, k, specs, where)
    _check_model(sizes.dim, blocks, model, where)
    tensors: dict[str, TensorSource] = {}
    for block, arrays in filled.items():
        for name, array in arrays.items():
            check_values(name, array, f"{where}, block {block}")
            tensors[f"block.{block}.{name}"] = from_array(array)
    policies = check_policies(policies, default_policy, blocks, sizes.slots, where)
    if slot_map is None:
        slot_map = make_slot_map(policies, blocks, sizes.slots)
    check_slot_map(slot_map, policies, blocks, sizes.slots, where)
    norms = check_norms(median_norm, blocks, where)
    concepts = check_concepts(concepts, sizes.atoms, where)
    tensors["slot_map"] = from_array(np.ascontiguousarray(slot_map))
    with new_artifact(path, "pack", overwrite=overwrite) as writer:
        writer.set(
            model=model.to_dict(),
            **attributes,
            dim=sizes.dim,
            atoms=sizes.atoms,
            slots=sizes.slots,
            dtype=DTYPE_LABELS[sizes.dtype],
            blocks=blocks,
            policies=[dataclasses.asdict(policy) for policy in policies],
            default_policy=default_policy,
            median_norm=norms,
            recipe=dict(recipe or {}),
        )
        writer.write_safetensors(STEERING, tensors)
        writer.add_jsonl(CONCEPTS, concept_rows(concepts))
    return load_pack(path, verify=False)


def load_pack(path: str | Path, verify: bool = True, progress: Progress | None = None) -> Pack:
    """Open a pack and check it.

    With ``verify`` every file is hashed and every weight must be finite; without it only the manifest, sizes,
    shapes and policies are checked.

    Raises
    ------
    ArtifactError, PolicyError
        If a file is missing, damaged, of a newer version, or its parts do not fit together.

    Example
    -------
    >>> load_pack("packs/smol").policy("default").slot
    2
    """
    artifact = open_artifact(path, "pack", verify=verify, progress=progress)
    path, data = artifact.path, artifact.manifest
    where = f"{path / MANIFEST}"
    try:
        attributes = {
            name: data[name] for name in ("op", "coder", "k", "k_out", "sign", "tol", "tau", "alpha")
        }
        blocks = _check_blocks(tuple(data["blocks"]), where)
        told = (data["atoms"], data["dim"], data["slots"], data["dtype"])
        norms = check_norms({int(key): norm for key, norm in data["median_norm"].items()}, blocks, where)
        rows = [Policy(**{**row, "blocks": tuple(row["blocks"])}) for row in data["policies"]]
        default, recipe, identity = data["default_policy"], dict(data["recipe"]), data["model"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{where}: a field is missing or of another type ({error}); make the pack again"
        ) from error
    check_attributes(**attributes, where=where)
    tensors = read_header(artifact.file(STEERING))
    where = f"{path / STEERING}"
    refs: dict[int, dict[str, TensorRef]] = {block: {} for block in blocks}
    for name, ref in tensors.items():
        head, _, operand = name.removeprefix("block.").partition(".")
        if name != "slot_map":
            if not name.startswith("block.") or not head.isdigit() or int(head) not in refs:
                raise ArtifactError(f"{where}: unexpected tensor '{name}'; make the pack again")
            refs[int(head)][operand] = ref
    specs = {block: {name: (r.dtype, r.shape) for name, r in refs[block].items()} for block in blocks}
    sizes = _check_all(attributes["op"], attributes["coder"], attributes["k"], specs, where)
    got = (sizes.atoms, sizes.dim, sizes.slots, DTYPE_LABELS[sizes.dtype])
    if got != told:
        raise ArtifactError(
            f"{where}: atoms, dim, slots, dtype are {got}, {MANIFEST} says {told}; make the pack again"
        )
    if "slot_map" not in tensors:
        raise ArtifactError(f"{where}: tensor 'slot_map' is missing; make the pack again")
    slot_map = tensors["slot_map"].read().copy()
    policies = check_policies(rows, default, blocks, sizes.slots, where)
    check_slot_map(slot_map, policies, blocks, sizes.slots, where)
    model = ModelIdentity.from_dict(identity, str(path / MANIFEST))
    _check_model(sizes.dim, blocks, model, where)
    pack = Pack(
        path=path,
        **attributes,
        dim=sizes.dim,
        atoms=sizes.atoms,
        slots_count=sizes.slots,
        dtype=DTYPE_LABELS[sizes.dtype],
        blocks=blocks,
        model=model,
        policies=policies,
        default_policy=default,
        slot_map=slot_map,
        median_norm=norms,
        concepts=read_concepts(artifact.file(CONCEPTS), sizes.atoms),
        recipe=recipe,
        refs={block: {name: refs[block][name] for name in sizes.names} for block in blocks},
    )
    if verify:
        pack.check_values()
    return pack


def _check_all(op: str, coder: str, k: int, specs: Mapping[int, Mapping[str, Any]], where: str) -> Sizes:
    """Check every block's operands and that all blocks agree, for one graph node type serves them all."""
    first: Sizes | None = None
    for block, spec in specs.items():
        sizes = check_specs(op, spec, f"{where}, block {block}")
        if first is not None and sizes != first:
            raise ArtifactError(
                f"{where}: block {block} has {sizes}, block {next(iter(specs))} has {first}; all blocks "
                "of a pack must have the same shapes, dtypes and operands"
            )
        first = sizes
    if first is None:
        raise ArtifactError(f"{where}: no block; give the operands of one block at least")
    if coder == "jumprelu" and "threshold" not in first.names:
        raise ArtifactError(f"{where}: coder jumprelu needs 'threshold' [{first.atoms}]; give it")
    check_k(coder, k, first.atoms, where)
    return first


def _check_model(dim: int, blocks: tuple[int, ...], model: ModelIdentity, where: str) -> None:
    if dim != model.hidden_size:
        raise ArtifactError(
            f"{where}: rows are {dim} wide, the model that it names has hidden_size {model.hidden_size}; "
            "make the pack from a dictionary of that model"
        )
    if blocks[-1] >= model.num_hidden_layers:
        raise ArtifactError(
            f"{where}: steers block {blocks[-1]}, the model that it names has blocks 0 to "
            f"{model.num_hidden_layers - 1}; choose among these"
        )


def _check_blocks(blocks: tuple[Any, ...], where: str) -> tuple[int, ...]:
    plain = all(isinstance(block, (int, np.integer)) and block >= 0 for block in blocks)
    if not plain or any(a >= b for a, b in itertools.pairwise(blocks)):
        raise ArtifactError(f"{where}: blocks must be unique ascending integers from 0, got {list(blocks)}")
    return tuple(int(block) for block in blocks)


def _join(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs drawn together: "3, 15-19"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
