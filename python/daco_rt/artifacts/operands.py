"""The operator contract as tables: which operands a steered block has, their dtypes and shapes, and checks.

m atoms (latents of an SAE, concepts of a dictionary, the rank of an affine edit), d width, P slots including 0 (off) and 1 (observe).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from daco_rt.errors import ArtifactError

CODERS = {
    "sae": ("topk", "relu", "jumprelu", "none"),
    "pursuit": ("omp", "elastic_net"),
    # An affine edit has no code; what stands here is its phi. Packs have no clamped ones.
    "affine": ("identity", "relu"),
}
SIGNS = ("positive", "signed", "nnls")
MAX_PURSUIT_K = 64

DTYPE_LABELS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "I8": "int8"}

_FLOAT, _WEIGHT, _GRAM, _BOOL = ("F32",), ("F32", "F16", "BF16", "I8"), ("F32", "F16"), ("BOOL",)
_PLAIN = _WEIGHT[:3]
_EDIT: dict[str, tuple[tuple[str, ...], str]] = {
    "gain": (_FLOAT, "Pm"),
    "boost": (_FLOAT, "Pm"),
    "undesirable": (_BOOL, "Pm"),
    "shift": (_FLOAT, "Pd"),
    "limits": (_FLOAT, "P4"),
    "scales": (_FLOAT, "2m"),
}
# Operand → allowed dtypes and shape letters, in the operator's order.
OPERANDS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "sae": {
        "enc": (_WEIGHT, "md"),
        "enc_bias": (_FLOAT, "m"),
        "dec": (_WEIGHT, "md"),
        "threshold": (_FLOAT, "m"),
        **_EDIT,
    },
    "pursuit": {
        "analysis": (_WEIGHT, "md"),
        "bias": (_FLOAT, "m"),
        "gram": (_GRAM, "mm"),
        "atoms": (_WEIGHT, "md"),
        **_EDIT,
    },
    "affine": {
        "a": (_PLAIN, "Pmd"),
        "a_bias": (_FLOAT, "Pm"),
        "b": (_PLAIN, "Pdm"),
        "shift": (_FLOAT, "Pd"),
        "limits": (_FLOAT, "P4"),
    },
}
OPTIONAL = frozenset({"threshold", "boost", "gram", "scales"})
# A missing one of these is read as an empty array; a missing gram is left out, for the host to build.
EMPTY_WHEN_ABSENT = frozenset({"threshold", "boost"})
MATRICES = {"sae": ("enc", "dec"), "pursuit": ("analysis", "atoms"), "affine": ("a", "b")}

Spec = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """What a block's operands agree on: m, d, P, the matrices' dtype ("F32", …), and which are present."""

    atoms: int
    dim: int
    slots: int
    dtype: str
    names: tuple[str, ...]


def check_specs(op: str, specs: Mapping[str, Spec], where: str) -> Sizes:
    """Check the dtypes and shapes of one block's operands against each other.

    Parameters
    ----------
    op : "sae", "pursuit" or "affine".
    specs : operand → (safetensors dtype, shape); empty optional operands are left out.
    where : the beginning of the error's sentence.

    Raises
    ------
    ArtifactError
        If an operand is missing, unknown, or of another dtype or shape than the rest asks for.
    """
    contract = OPERANDS[op]
    first, second = MATRICES[op]
    unknown = sorted(specs.keys() - contract.keys())
    missing = sorted(contract.keys() - OPTIONAL - specs.keys())
    if unknown or missing:
        what = f"unknown operand '{unknown[0]}'" if unknown else f"operand '{missing[0]}' is missing"
        raise ArtifactError(f"{where}: {what}; {op} takes {', '.join(contract)}")
    table = "a" if op == "affine" else "gain"  # the operand that says how many slots there are
    for name in dict.fromkeys((first, table)):
        if len(specs[name][1]) != len(contract[name][1]) or 0 in specs[name][1]:
            what = "a matrix" if len(contract[name][1]) == 2 else "a matrix a slot"
            raise ArtifactError(f"{where}: '{name}' must be {what} with elements, got {list(specs[name][1])}")
    (m, d), slots = specs[first][1][-2:], specs[table][1][0]
    if slots < 2:
        raise ArtifactError(
            f"{where}: '{table}' must have a row a slot, off and observe included, got {slots} rows"
        )
    lengths = {"m": m, "d": d, "P": slots, "2": 2, "4": 4}
    for name, (dtype, shape) in specs.items():
        dtypes, letters = contract[name]
        expected = tuple(lengths[letter] for letter in letters)
        if shape != expected:
            raise ArtifactError(
                f"{where}: '{name}' must have shape {list(expected)} (from {first} {[m, d]} and {slots} "
                f"slots), got {list(shape)}"
            )
        if dtype not in dtypes:
            raise ArtifactError(f"{where}: '{name}' must be {' or '.join(dtypes)}, got {dtype}")
    if specs[first][0] != specs[second][0]:
        raise ArtifactError(
            f"{where}: '{first}' and '{second}' must have one dtype, got {specs[first][0]} and "
            f"{specs[second][0]}"
        )
    quantised = specs[first][0] == "I8"
    if quantised != ("scales" in specs):
        needs = "needs 'scales' [2, m]" if quantised else "takes no 'scales', they belong to I8 matrices"
        raise ArtifactError(f"{where}: '{first}' of dtype {specs[first][0]} {needs}")
    return Sizes(m, d, slots, specs[first][0], tuple(name for name in contract if name in specs))


def check_attributes(
    op: str, coder: str, k: int, k_out: int, sign: str, tol: float, tau: float, alpha: float, where: str
) -> None:
    """Check the operator's attributes by themselves.

    Raises
    ------
    ArtifactError
        If one is unknown or out of its range.
    """
    if not isinstance(op, str) or op not in CODERS:
        raise ArtifactError(f"{where}: op must be one of {', '.join(CODERS)}, got {op!r}")
    if coder not in CODERS[op]:
        raise ArtifactError(f"{where}: coder of {op} must be one of {', '.join(CODERS[op])}, got {coder!r}")
    if sign not in SIGNS:
        raise ArtifactError(f"{where}: sign must be one of {', '.join(SIGNS)}, got {sign!r}")
    if type(k) is not int or k < 1 or (coder == "omp" and k > MAX_PURSUIT_K):
        bound = f" and at most {MAX_PURSUIT_K}" if coder == "omp" else ""
        raise ArtifactError(f"{where}: k must be an integer of at least 1{bound}, got {k!r}")
    if type(k_out) is not int or k_out < 0:
        raise ArtifactError(f"{where}: k_out must be an integer of at least 0, got {k_out!r}")
    for name, value, top in (("tol", tol, np.inf), ("tau", tau, 1.0), ("alpha", alpha, np.inf)):
        if type(value) not in (int, float) or not 0 <= value <= top or not np.isfinite(value):
            raise ArtifactError(f"{where}: {name} must be a finite number from 0 to {top:g}, got {value!r}")
    if coder == "elastic_net" and alpha == 0:
        raise ArtifactError(f"{where}: alpha must be above 0 with coder elastic_net, got {alpha!r}")


def check_k(coder: str, k: int, atoms: int, where: str) -> None:
    """Refuse a support larger than the dictionary. Coders without a k are not asked."""
    if coder in ("topk", "omp") and k > atoms:
        raise ArtifactError(f"{where}: k = {k} is larger than the {atoms} atoms; lower k or add atoms")


def check_norms(norms: Mapping[int, float], blocks: Sequence[int], where: str) -> dict[int, float]:
    """Return the blocks' median residual norms after checking that each has one, positive and finite.

    Raises
    ------
    ArtifactError
        If a block has none, or one that is no positive number.
    """
    if set(norms) != set(blocks) or not all(0 < float(norm) < np.inf for norm in norms.values()):
        raise ArtifactError(
            f"{where}: median_norm must give one positive number for each of the blocks {list(blocks)}, "
            f"got {dict(norms)}"
        )
    return {block: float(norms[block]) for block in blocks}


def check_values(name: str, array: np.ndarray, where: str) -> None:
    """Refuse values that would make the operator write nonsense.

    Raises
    ------
    ArtifactError
        If a weight is NaN or Inf, a flag is neither 0 nor 1, a deadband is negative or the reserved column of
        ``limits`` is used.
    """
    bad = first_bad(array)
    if bad is not None:
        value = "neither 0 nor 1" if array.dtype == np.bool_ else f"{array.reshape(-1)[bad]}"
        place = [int(i) for i in np.unravel_index(bad, array.shape)]
        raise ArtifactError(
            f"{where}: '{name}' holds a value that is {value} at {place}; only finite weights are "
            "accepted: make it again"
        )
    if name == "scales" and (array <= 0).any():
        raise ArtifactError(f"{where}: 'scales' must be above 0; make it again")
    if name == "limits":
        if (array[:, 0] < 0).any():
            raise ArtifactError(f"{where}: 'limits' has a negative deadband; use 0 for none")
        if (array[:, 3] != 0).any():
            raise ArtifactError(f"{where}: the last column of 'limits' is reserved and must be 0")


def first_bad(array: np.ndarray) -> int | None:
    """Return the flat index of the first NaN, Inf or broken bool, or None. Reads 4 MiB at a time."""
    flat = array.reshape(-1)
    if array.dtype == np.int8:
        return None  # every byte is a number
    if array.dtype == np.bool_:
        raw, mask, limit = flat.view(np.uint8), 0xFE, None
    elif array.dtype.itemsize == 4:
        raw, mask, limit = flat.view(np.uint32), 0x7F800000, 0x7F800000
    else:
        mask = 0x7C00 if array.dtype == np.float16 else 0x7F80
        raw, limit = flat.view(np.uint16), mask
    # All-ones exponents are exactly NaN and Inf; comparing bits works for bf16 too and needs no float pass.
    step = (4 << 20) // raw.itemsize
    for start in range(0, raw.size, step):
        bits = raw[start : start + step] & raw.dtype.type(mask)
        bad = bits != 0 if limit is None else bits == limit
        if bad.any():
            return start + int(bad.argmax())
    return None
