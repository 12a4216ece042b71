"""What the operands of a steering operator must be, checked the same way for every array library.

Arrays are looked at through ``.shape`` and a function that names their dtype (``"float32"``,
``"bfloat16"``, ``"int32"``, ``"bool"``). A wrong dtype raises :class:`TypeError`, a wrong shape or range
:class:`ValueError`; each message is one sentence that starts with the operator and the argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

MAX_PURSUIT = 64
"""Largest support of the pursuit coders."""

SAE_CODERS = ("topk", "relu", "jumprelu", "none")
PURSUIT_CODERS = ("omp", "elastic_net")
SIGNS = ("positive", "signed", "nnls")
PHIS = ("identity", "relu", "clamp")

_FLOATS = ("float32", "float16", "bfloat16")
_QUANTISED = ("int8", "float8_e4m3fn")
_INT32_MAX = 2**31 - 1


class Policies(NamedTuple):
    """The operands that the operators with a code share."""

    gain: Any
    boost: Any | None
    undesirable: Any
    shift: Any
    limits: Any
    scales: Any | None


def check_sae(
    name_dtype: Callable[[Any], str],
    z: Any,
    slots: Any,
    enc: Any,
    enc_bias: Any,
    dec: Any,
    threshold: Any | None,
    policies: Policies,
    coder: str,
    k: int,
    k_out: int,
) -> None:
    """Refuse operands of ``steer_sae`` that do not fit together; absent ones are ``None``."""
    op = "steer_sae"
    _one_of(op, "coder", coder, SAE_CODERS)
    d = _rows(op, name_dtype, z, slots)
    m = _weights(op, name_dtype, ("enc", enc), ("dec", dec), d)
    _floats(op, name_dtype, "enc_bias", enc_bias, "(m,)", m=m)
    if threshold is not None:
        _floats(op, name_dtype, "threshold", threshold, "(m,)", m=m)
    elif coder == "jumprelu":
        raise ValueError(f"{op}: threshold must be given with coder 'jumprelu', got None")
    _policies(op, name_dtype, policies, m, d, name_dtype(enc))
    if coder == "topk":
        _count(op, "k", k, 1, m, "the number of atoms m")
    _count(op, "k_out", k_out, 0, _INT32_MAX)


def check_pursuit(
    name_dtype: Callable[[Any], str],
    z: Any,
    slots: Any,
    analysis: Any,
    bias: Any,
    gram: Any | None,
    atoms: Any,
    policies: Policies,
    coder: str,
    k: int,
    sign: str,
    tol: float,
    tau: float,
    alpha: float,
    k_out: int,
) -> None:
    """Refuse operands of ``steer_pursuit`` that do not fit together; absent ones are ``None``."""
    op = "steer_pursuit"
    _one_of(op, "coder", coder, PURSUIT_CODERS)
    _one_of(op, "sign", sign, SIGNS)
    d = _rows(op, name_dtype, z, slots)
    m = _weights(op, name_dtype, ("analysis", analysis), ("atoms", atoms), d)
    _floats(op, name_dtype, "bias", bias, "(m,)", m=m)
    if gram is not None:
        _dtype(op, "gram", name_dtype(gram), ("float32", "float16"))
        _shape(op, "gram", gram, "(m, m)", m=m)
    _policies(op, name_dtype, policies, m, d, name_dtype(analysis))
    if coder == "omp":
        _count(op, "k", k, 1, MAX_PURSUIT)
        _count(op, "k", k, 1, m, "the number of atoms m")
        if not 0 <= tol < float("inf"):
            raise ValueError(f"{op}: tol must be a fraction of the row's norm, 0 or more, got {tol}")
    else:
        _count(op, "k", k, 0, _INT32_MAX)
        if not 0 <= tau <= 1:
            raise ValueError(f"{op}: tau must be the L1 share of the penalty, 0 to 1, got {tau}")
        if not 0 < alpha < float("inf"):
            raise ValueError(f"{op}: alpha must be the strength of the penalty, above 0, got {alpha}")
    _count(op, "k_out", k_out, 0, _INT32_MAX)


def check_affine(
    name_dtype: Callable[[Any], str],
    z: Any,
    slots: Any,
    a: Any,
    a_bias: Any,
    b: Any,
    shift: Any,
    limits: Any,
    phi: str,
    low: float,
    high: float,
) -> None:
    """Refuse operands of ``steer_affine`` that do not fit together."""
    op = "steer_affine"
    _one_of(op, "phi", phi, PHIS)
    d = _rows(op, name_dtype, z, slots)
    dtype = name_dtype(a)
    _dtype(op, "a", dtype, _FLOATS)
    shape = a.shape
    if len(shape) != 3 or shape[0] < 2 or shape[1] < 1 or shape[2] != d:
        raise ValueError(
            f"{op}: a must have shape (P, r, d) with d={d}, r >= 1 and P >= 2 (slots 0 and 1 are counted),"
            f" got {_text(shape)}"
        )
    p, r = shape[:2]
    _floats(op, name_dtype, "a_bias", a_bias, "(P, r)", P=p, r=r)
    if name_dtype(b) != dtype:
        raise TypeError(f"{op}: b must have dtype {dtype} like a, got {name_dtype(b)}")
    _shape(op, "b", b, "(P, d, r)", P=p, d=d, r=r)
    _floats(op, name_dtype, "shift", shift, "(P, d)", P=p, d=d)
    _floats(op, name_dtype, "limits", limits, "(P, 4)", P=p)
    if phi == "clamp" and not low <= high:
        raise ValueError(f"{op}: clamp must be (low, high) with low <= high, got ({low}, {high})")


def check_gram(
    name_dtype: Callable[[Any], str], analysis: Any, atoms: Any, scales: Any | None, dtype: str
) -> None:
    """Refuse operands of ``build_gram``; ``dtype`` is the name of the result's."""
    op = "build_gram"
    if len(analysis.shape) != 2:
        raise ValueError(f"{op}: analysis must have shape (m, d), got {_text(analysis.shape)}")
    m = _weights(op, name_dtype, ("analysis", analysis), ("atoms", atoms), analysis.shape[1])
    _scales(op, name_dtype, scales, m, name_dtype(analysis))
    _dtype(op, "dtype", dtype, ("float32", "float16"))


def _rows(op: str, name_dtype: Callable[[Any], str], z: Any, slots: Any) -> int:
    _dtype(op, "z", name_dtype(z), _FLOATS)
    if len(z.shape) < 1 or z.shape[-1] < 1:
        raise ValueError(f"{op}: z must have shape (..., d) with d >= 1, got {_text(z.shape)}")
    _dtype(op, "slots", name_dtype(slots), ("int32",))
    if tuple(slots.shape) != tuple(z.shape[:-1]):
        raise ValueError(
            f"{op}: slots must have the shape of z without its last axis, {_text(z.shape[:-1])},"
            f" got {_text(slots.shape)}"
        )
    return z.shape[-1]


def _weights(
    op: str, name_dtype: Callable[[Any], str], first: tuple[str, Any], second: tuple[str, Any], d: int
) -> int:
    """Check the two big matrices and return m."""
    (first_name, matrix), (second_name, other) = first, second
    dtype = name_dtype(matrix)
    _dtype(op, first_name, dtype, (*_FLOATS, *_QUANTISED))
    shape = matrix.shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] != d:
        raise ValueError(f"{op}: {first_name} must have shape (m, d) with d={d}, got {_text(shape)}")
    if name_dtype(other) != dtype:
        raise TypeError(
            f"{op}: {second_name} must have dtype {dtype} like {first_name}, got {name_dtype(other)}"
        )
    _shape(op, second_name, other, "(m, d)", m=shape[0], d=d)
    return shape[0]


def _policies(
    op: str,
    name_dtype: Callable[[Any], str],
    operands: Policies,
    m: int,
    d: int,
    weight: str,
) -> None:
    gain = operands.gain
    _dtype(op, "gain", name_dtype(gain), ("float32",))
    shape = gain.shape
    if len(shape) != 2 or shape[0] < 2 or shape[1] != m:
        raise ValueError(
            f"{op}: gain must have shape (P, m) with m={m} and P >= 2 (slots 0 and 1 are counted),"
            f" got {_text(shape)}"
        )
    p = shape[0]
    if operands.boost is not None:
        _floats(op, name_dtype, "boost", operands.boost, "(P, m)", P=p, m=m)
    _dtype(op, "undesirable", name_dtype(operands.undesirable), ("bool",))
    _shape(op, "undesirable", operands.undesirable, "(P, m)", P=p, m=m)
    _floats(op, name_dtype, "shift", operands.shift, "(P, d)", P=p, d=d)
    _floats(op, name_dtype, "limits", operands.limits, "(P, 4)", P=p)
    _scales(op, name_dtype, operands.scales, m, weight)


def _scales(op: str, name_dtype: Callable[[Any], str], scales: Any | None, m: int, weight: str) -> None:
    """Refuse quantised weights without scales, and the reverse."""
    if weight in _QUANTISED:
        if scales is None:
            raise ValueError(f"{op}: scales must be given with {weight} weights, shape (2, m) with m={m}")
        _floats(op, name_dtype, "scales", scales, "(2, m)", m=m)
    elif scales is not None:
        raise ValueError(
            f"{op}: scales must be None with {weight} weights, they belong to quantised ones,"
            f" got shape {_text(scales.shape)}"
        )


def _floats(op: str, name_dtype: Callable[[Any], str], name: str, x: Any, letters: str, **sizes: int) -> None:
    _dtype(op, name, name_dtype(x), ("float32",))
    _shape(op, name, x, letters, **sizes)


def _shape(op: str, name: str, x: Any, letters: str, **sizes: int) -> None:
    wanted = tuple([sizes[a] if a in sizes else int(a) for a in _axes(letters)])
    if tuple(x.shape) != wanted:
        known = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
        raise ValueError(f"{op}: {name} must have shape {letters} with {known}, got {_text(x.shape)}")


@functools.cache
def _axes(letters: str) -> tuple[str, ...]:
    return tuple(letters.strip("(,)").split(", "))


def _dtype(op: str, name: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise TypeError(f"{op}: {name} must be {_either(allowed)}, got {got}")


def _one_of(op: str, name: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ValueError(f"{op}: {name} must be {_either([repr(a) for a in allowed])}, got {got!r}")


def _count(op: str, name: str, got: int, low: int, high: int, what: str = "") -> None:
    if isinstance(got, bool) or not hasattr(got, "__index__"):
        raise TypeError(f"{op}: {name} must be an int, got {type(got).__name__}")
    if got < low:
        raise ValueError(f"{op}: {name} must be at least {low}, got {got}")
    if got > high:
        limit = f"{what}={high}" if what else str(high)
        raise ValueError(f"{op}: {name} must be at most {limit}, got {got}")


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _text(shape: Any) -> str:
    sizes = [str(s) for s in shape]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"
