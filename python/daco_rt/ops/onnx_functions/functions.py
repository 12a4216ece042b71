"""Which operator attributes have a form in standard operators, and that form."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from daco_rt.errors import UnsupportedError
from daco_rt.ops.onnx_functions import coders, rows
from daco_rt.ops.onnx_functions.affine import affine_edit
from daco_rt.ops.onnx_functions.body import FLOAT, Body, Matrix

DOMAIN = "ai.daco"
OPSET = 24
MAX_UNROLLED = 16
"""Largest pursuit support with a function: each step adds about thirty nodes."""

_INPUTS = {
    "SteerSae": (
        "z", "slots", "enc", "enc_bias", "dec", "threshold",
        "gain", "boost", "undesirable", "shift", "limits", "scales",
    ),
    "SteerPursuit": (
        "z", "slots", "analysis", "bias", "gram", "atoms",
        "gain", "boost", "undesirable", "shift", "limits", "scales",
    ),
    "SteerAffine": ("z", "slots", "a", "a_bias", "b", "shift", "limits"),
}  # fmt: skip
_OUTPUTS = ("z_out", "doses", "support_index", "support_value")
_CODERS = {"SteerSae": ("topk", "relu", "jumprelu", "none"), "SteerPursuit": ("omp", "elastic_net")}
_ACTIVATIONS = {"fp32": FLOAT, "fp16": int(ir.DataType.FLOAT16), "bf16": int(ir.DataType.BFLOAT16)}
_WEIGHTS = ("fp32", "fp16", "bf16", "int8")
_PHIS = ("identity", "relu", "clamp")

Activation = Literal["fp32", "fp16", "bf16"]
Weight = Literal["fp32", "fp16", "bf16", "int8"]


def function_refusal(op_type: str, *, coder: str, k: int, sign: str = "positive") -> str | None:
    """Say why an operator has no function, or return ``None`` if it has one.

    Example
    -------
    >>> function_refusal("SteerPursuit", coder="omp", k=16) is None
    True
    """
    if op_type != "SteerPursuit":
        return None
    what = None
    if coder == "elastic_net":
        what = "coder 'elastic_net'"
    elif sign == "nnls":
        what = "sign 'nnls'"
    elif k > MAX_UNROLLED:
        what = f"coder '{coder}' and k = {k} (more than {MAX_UNROLLED})"
    if what is None:
        return None
    return f"{op_type} with {what} has no standard-operator form: the custom-op library is required"


def has_function(op_type: str, *, coder: str, k: int, sign: str = "positive") -> bool:
    """Whether :func:`steer_function` can build this operator; :func:`function_refusal` says why not."""
    return function_refusal(op_type, coder=coder, k=k, sign=sign) is None


def steer_function(
    op_type: Literal["SteerSae", "SteerPursuit"],
    *,
    coder: str,
    k: int,
    k_out: int,
    sign: str = "positive",
    tol: float = 0.0,
    activation: Activation = "fp32",
    weight: Weight = "fp32",
) -> ir.Function:
    """Build the model-local function of one steering operator.

    Same name, domain, inputs, outputs and attributes as the operator, so that one node is served by
    either. A model holds one body for each ``op_type``; all its nodes share coder, k, k_out and dtypes.

    Parameters
    ----------
    op_type : "SteerSae" or "SteerPursuit".
    coder : "topk", "relu", "jumprelu", "none" (SteerSae); "omp" (SteerPursuit).
    k : support size of ``topk`` and ``omp``; at most :data:`MAX_UNROLLED` for ``omp``.
    k_out : width of the reported support; 0 reports none.
    sign, tol : of the pursuit.
    activation : dtype of z and z'. Everything inside is fp32.
    weight : dtype of the two big matrices.

    Returns
    -------
    onnx_ir.Function
        Opset 24. ``boost``, ``threshold`` (but for jumprelu), ``gram`` and ``scales`` (but for int8) may be
        left out by a node ("").

    Raises
    ------
    UnsupportedError
        The combination has no form in standard operators.
    ValueError
        An attribute is out of range.

    Example
    -------
    >>> function = steer_function("SteerSae", coder="topk", k=32, k_out=8)
    >>> model.functions[function.identifier()] = function
    """
    _check(op_type, coder, k, k_out, sign, tol, activation, weight)
    refusal = function_refusal(op_type, coder=coder, k=k, sign=sign)
    if refusal:
        raise UnsupportedError(refusal)

    inputs = [ir.Value(name=name) for name in _INPUTS[op_type]]
    of = dict(zip(_INPUTS[op_type], inputs, strict=True))
    op = Body()
    here = rows.read_rows(op, of["z"], of["slots"], of["gain"])
    policies = rows.read_policies(op, of["gain"], of["boost"], of["undesirable"], of["shift"], of["limits"])
    code: rows.Code | None
    if op_type == "SteerPursuit":
        analysis, atoms = _matrices(op, of, "analysis", "atoms", weight)
        code = coders.pursuit(op, here, analysis, of["bias"], atoms, k=k, signed=sign == "signed", tol=tol)
    else:
        enc, atoms = _matrices(op, of, "enc", "dec", weight if coder != "none" else "fp32")
        code = _sae_code(op, here, policies, of, enc, coder, k)
    strength = None if code is None else rows.strengths(op, code, rows.atom_norms(op, atoms))
    edited = rows.edit(op, here, policies, code, strength, atoms)
    index, value = rows.support(op, here, code, strength, k_out)
    outputs = (
        rows.output_rows(op, here, edited, of["z"], _ACTIVATIONS[activation]),
        rows.unflatten(op, rows.doses(op, here, policies, edited, code, strength), of["slots"], 2),
        rows.unflatten(op, index, of["slots"], k_out),
        rows.unflatten(op, value, of["slots"], k_out),
    )
    for name, output in zip(_OUTPUTS, outputs, strict=True):
        output.name = name
    graph = ir.Graph(inputs, outputs, nodes=op.nodes, opset_imports={"": OPSET}, name=op_type)
    return ir.Function(
        DOMAIN, op_type, graph=graph, attributes=_attributes(op_type, coder, k, k_out, sign, tol)
    )


def affine_function(
    *,
    phi: Literal["identity", "relu", "clamp"] = "identity",
    clamp: tuple[float, float] = (0.0, 1.0),
    activation: Activation = "fp32",
    weight: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> ir.Function:
    """Build the model-local function of ``SteerAffine``, as :func:`steer_function` does for the others.

    Parameters
    ----------
    phi, clamp : of the operator.
    activation : dtype of z and z'. Everything inside is fp32.
    weight : dtype of ``a`` and ``b``.

    Raises
    ------
    ValueError
        An attribute is out of range.

    Example
    -------
    >>> affine_function(phi="relu").name
    'SteerAffine'
    """
    _expect("affine_function", "phi", phi, _PHIS)
    _expect("affine_function", "activation", activation, tuple(_ACTIVATIONS))
    _expect("affine_function", "weight", weight, _WEIGHTS[:3])
    if not clamp[0] <= clamp[1]:
        raise ValueError(f"affine_function: clamp must be (low, high) with low <= high, got {clamp}")
    op_type = "SteerAffine"
    inputs = [ir.Value(name=name) for name in _INPUTS[op_type]]
    z, slots, a, a_bias, b, shift, limits = inputs
    op = Body()
    here = rows.read_rows(op, z, slots, limits)
    if weight != "fp32":
        a, b = op.float32(a), op.float32(b)
    edited = affine_edit(op, here, a, a_bias, b, shift, limits, phi=phi, clamp=clamp)
    outputs = (
        rows.output_rows(op, here, edited, z, _ACTIVATIONS[activation]),
        rows.unflatten(op, rows.doses(op, here, None, edited, None, None), slots, 2),
    )
    for name, output in zip(_OUTPUTS, outputs, strict=False):
        output.name = name
    graph = ir.Graph(inputs, outputs, nodes=op.nodes, opset_imports={"": OPSET}, name=op_type)
    attributes = [ir.AttrString("phi", phi), ir.AttrFloat32s("clamp", [float(x) for x in clamp]), *_plugin()]
    return ir.Function(DOMAIN, op_type, graph=graph, attributes=attributes)


def _matrices(op: Body, of, first: str, second: str, weight: str) -> tuple[Matrix, Matrix]:
    """The two big matrices with what brings them into fp32."""
    scales: list[ir.Value | None] = [None, None]
    if weight == "int8":
        scales = [op("Gather", of["scales"], op.scalar(row), axis=0) for row in (0, 1)]
    wide = weight == "fp32"
    return Matrix(of[first], wide, scales[0]), Matrix(of[second], wide, scales[1])


def _sae_code(
    op: Body, here: rows.Rows, policies: rows.Policies, of, enc: Matrix, coder: str, k: int
) -> rows.Code | None:
    if coder == "none":
        return None
    if coder == "topk":
        return coders.topk(op, here, enc, of["enc_bias"], k)
    watched = coders.watched_latents(op, policies.gain, policies.boost, policies.undesirable)
    level = of["threshold"] if coder == "jumprelu" else None
    return coders.above(op, here, enc, of["enc_bias"], level, watched)


def _attributes(op_type: str, coder: str, k: int, k_out: int, sign: str, tol: float) -> list[ir.Attr]:
    """Every attribute that a node may carry, with this body's values as defaults.

    The body is already specialised, so it refers to none of them; undeclared ones would make a node
    invalid.
    """
    common = [ir.AttrString("coder", coder), ir.AttrInt64("k", k), ir.AttrInt64("k_out", k_out)]
    if op_type == "SteerPursuit":
        common += [
            ir.AttrString("sign", sign),
            ir.AttrFloat32("tol", tol),
            ir.AttrFloat32("tau", 0.95),
            ir.AttrFloat32("alpha", 0.05),
        ]
    return [*common, *_plugin()]


def _plugin() -> list[ir.Attr]:
    return [ir.AttrString("plugin_namespace", DOMAIN), ir.AttrString("plugin_version", "1")]


def _check(op_type, coder, k, k_out, sign, tol, activation, weight) -> None:
    where = "steer_function"
    _expect(where, "op_type", op_type, tuple(_CODERS))
    _expect(where, "coder", coder, _CODERS[op_type])
    _expect(where, "sign", sign, ("positive", "signed", "nnls"))
    _expect(where, "activation", activation, tuple(_ACTIVATIONS))
    _expect(where, "weight", weight, _WEIGHTS)
    if coder in ("topk", "omp", "elastic_net") and k < 1:
        raise ValueError(f"steer_function: k must be at least 1, got {k}")
    if k_out < 0:
        raise ValueError(f"steer_function: k_out must be 0 or more, got {k_out}")
    if not tol >= 0:
        raise ValueError(f"steer_function: tol must be 0 or more, got {tol}")


def _expect(where: str, name: str, got, allowed) -> None:
    if got not in allowed:
        raise ValueError(f"{where}: {name} must be one of {', '.join(allowed)}, got {got!r}")
