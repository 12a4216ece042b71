"""The standard-operator functions against the float64 reference, in ONNX Runtime without a custom library."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from daco_rt.errors import DacoError
from daco_rt.ops import quantise, reference
from daco_rt.ops.onnx_functions import steer_function
from daco_rt.ops.outcomes import Outcomes

BIG = {
    "SteerSae": ("enc", "enc_bias", "dec", "threshold"),
    "SteerPursuit": ("analysis", "bias", "gram", "atoms"),
}
EDIT = ("gain", "boost", "undesirable", "shift", "limits")
NUMPY = {"fp32": np.float32, "fp16": np.float16}
KINDS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
ROW_KINDS = 6  # slot -1, slot P, NaN row, Inf row, zero row, NaN row under slot 0


def operands_for(op_type, coder, *, d, m, policies, weight, rng, boost=True):
    """Random operands: a few off rows, mixed gains, deadbands, caps and norm keeping."""
    unit = rng.normal(size=(m, d))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    unit[m // 2] = unit[m // 3]  # a duplicate atom
    names = BIG[op_type]
    exact = unit * rng.uniform(0.5, 1.5, (m, 1))
    first, first_scale = store(exact, weight)
    second, second_scale = first, first_scale
    if op_type == "SteerSae":
        second, second_scale = store(unit + 0.1 * rng.normal(size=(m, d)), weight)
    big = {names[0]: first, names[1]: (0.1 * rng.normal(size=m)).astype(np.float32)}
    if weight == "int8":
        big["scales"] = np.stack([first_scale, second_scale])
    if op_type == "SteerPursuit":
        big |= {"atoms": second}
    else:
        big |= {"dec": second}
        if coder == "jumprelu":
            big["threshold"] = rng.uniform(0, 0.5, m).astype(np.float32)
    p = policies
    edit = {
        "gain": np.where(rng.random((p, m)) < 0.4, rng.choice([0, -1, 0.5, 2], (p, m)), 1).astype(np.float32),
        "undesirable": rng.random((p, m)) < 0.5,
        "shift": (rng.normal(size=(p, d)) * (np.arange(p) % 2)[:, None]).astype(np.float32),
        "limits": np.stack(
            [rng.choice([0, 0.5], p), np.arange(p) % 3 * 0.2, np.arange(p) % 4 == 3, np.zeros(p)], 1
        ).astype(np.float32),
    }
    if boost:
        edit["boost"] = (rng.normal(size=(p, m)) * (rng.random((p, m)) < 0.2)).astype(np.float32)
    return big | edit


def store(matrix, weight):
    return quantise(matrix) if weight == "int8" else (matrix.astype(NUMPY[weight]), None)


def rows_for(*, rows, d, policies, activation, rng):
    z = (3 * rng.normal(size=(1, rows, d))).astype(NUMPY[activation])
    slots = rng.integers(0, policies, (1, rows)).astype(np.int32)
    slots[0, :ROW_KINDS] = [-1, policies, 2, 2, 2, 0]
    z[0, 2, 0] = np.nan
    z[0, 3, -1] = -np.inf
    z[0, 4] = 0
    z[0, 5, 0] = np.nan
    return z, slots


def model_of(op_type, function, operands, *, activation, coder, k, k_out, sign="positive", tol=0.0, d):
    """One steering node with its function, weights as initialisers."""
    z = ir.val("z", dtype=KINDS[activation], shape=["B", "S", d])
    slots = ir.val("slots", dtype=ir.DataType.INT32, shape=["B", "S"])
    inputs, weights = [z, slots], []
    for name in (*BIG[op_type], *EDIT, "scales"):
        if name not in operands:
            inputs.append(None)
            continue
        tensor = ir.tensor(np.ascontiguousarray(operands[name]), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        weights.append(value)
        inputs.append(value)
    outputs = [
        ir.val("z_out", dtype=z.dtype, shape=["B", "S", d]),
        ir.val("doses", dtype=ir.DataType.FLOAT, shape=["B", "S", 2]),
        ir.val("support_index", dtype=ir.DataType.INT32, shape=["B", "S", k_out]),
        ir.val("support_value", dtype=ir.DataType.FLOAT, shape=["B", "S", k_out]),
    ]
    attributes = [
        ir.AttrString("coder", coder),
        ir.AttrInt64("k", k),
        ir.AttrInt64("k_out", k_out),
        ir.AttrString("plugin_namespace", "ai.daco"),
        ir.AttrString("plugin_version", "1"),
    ]
    if op_type == "SteerPursuit":
        numbers = {"tol": tol, "tau": 0.95, "alpha": 0.05}
        attributes += [ir.AttrFloat32(name, number) for name, number in numbers.items()]
        attributes.append(ir.AttrString("sign", sign))
    node = ir.Node("ai.daco", op_type, inputs, attributes, outputs=outputs)
    graph = ir.Graph(
        [z, slots],
        outputs,
        nodes=[node],
        initializers=weights,
        opset_imports={"": 24, "ai.daco": 1},
        name="g",
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=11, functions=[function]))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto, z, slots):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return reference.Steered(*session.run(None, {"z": z, "slots": slots}))


def expected(op_type, z, slots, operands, **attributes):
    names = BIG[op_type]
    steer = reference.steer_sae if op_type == "SteerSae" else reference.steer_pursuit
    positional = [operands[name] for name in names if name not in ("threshold", "gram")]
    named = {name: operands[name] for name in (*EDIT, "threshold", "scales") if name in operands}
    return steer(z, slots, *positional, **named, **attributes)


def clear_rows(z, slots, operands, **attributes) -> np.ndarray:
    """Rows under a slot that exists and next to no cliff, [T]; their results are compared strictly."""
    outcomes = Outcomes(operands, **attributes)
    policies = len(operands["gain"])
    return np.array(
        [0 <= p < policies and outcomes.clear(row, p) for row, p in zip(z[0], slots[0], strict=True)]
    )


def check(
    op_type,
    *,
    coder,
    k,
    k_out=4,
    d,
    m,
    rows=24,
    policies=6,
    activation="fp32",
    weight="fp32",
    seed=0,
    boost=True,
    **pursuit,
):
    """Run the function and the reference; return how many rows were compared strictly."""
    rng = np.random.default_rng([seed, d, m, k])
    operands = operands_for(op_type, coder, d=d, m=m, policies=policies, weight=weight, rng=rng, boost=boost)
    z, slots = rows_for(rows=rows, d=d, policies=policies, activation=activation, rng=rng)
    attributes = {"coder": coder, "k": k, "k_out": k_out, **pursuit}
    function = steer_function(op_type, **attributes, activation=activation, weight=weight)
    got = run(model_of(op_type, function, operands, activation=activation, d=d, **attributes), z, slots)
    want = expected(op_type, z, slots, operands, **attributes)

    assert got.z.dtype == z.dtype
    assert got.z.shape == z.shape
    assert got.support_index.shape == (*slots.shape, k_out)
    same_bits(got.z[slots == 0], z[slots == 0])
    same_bits(got.z[slots == 1], z[slots == 1])
    poisoned = ~np.isfinite(z).all(-1) & (slots >= 0) & (slots < policies)
    same_bits(got.z[poisoned], z[poisoned])
    outside = (slots < 0) | (slots >= policies)
    assert np.isnan(got.z[outside]).all()
    np.testing.assert_array_equal(np.isnan(got.doses), np.isnan(want.doses))

    strict = clear_rows(z, slots, operands, coder=coder, k=k, **pursuit) & np.isfinite(z[0]).all(-1)
    norm = np.maximum(np.linalg.norm(z[0].astype(np.float64), axis=1), 1e-30)
    with np.errstate(invalid="ignore"):
        error = np.linalg.norm(got.z[0].astype(np.float64) - want.z[0], axis=1) / norm
    assert error[strict].max() <= (1e-5 if activation == "fp32" else 1e-3)
    np.testing.assert_allclose(got.doses[0][strict], want.doses[0][strict], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got.support_index[0][strict], want.support_index[0][strict])
    np.testing.assert_allclose(
        got.support_value[0][strict], want.support_value[0][strict], rtol=1e-3, atol=1e-4
    )
    for row in got.support_index[0]:  # near ties may choose otherwise, never nonsense
        named = row[row >= 0]
        assert len(set(named)) == len(named)
        assert (named < m).all()
    return int(strict.sum())


def same_bits(a, b):
    np.testing.assert_array_equal(
        np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
    )


@pytest.mark.parametrize("activation", ["fp32", "fp16"])
@pytest.mark.parametrize("coder", ["topk", "relu", "jumprelu", "none"])
@pytest.mark.parametrize(
    ("d", "m", "k", "k_out"), [(7, 13, 3, 5), (33, 70, 9, 2), (64, 65, 17, 17), (5, 3, 1, 4)]
)
def test_sae_matches_reference(coder, activation, d, m, k, k_out):
    strict = check("SteerSae", coder=coder, k=k, k_out=k_out, d=d, m=m, activation=activation)
    assert strict >= 12


@pytest.mark.parametrize("sign", ["positive", "signed"])
@pytest.mark.parametrize(
    ("d", "m", "k", "tol"), [(9, 17, 1, 0.0), (40, 81, 5, 0.4), (65, 129, 16, 0.0), (7, 5, 3, 0.0)]
)
def test_pursuit_matches_reference(sign, d, m, k, tol):
    strict = check("SteerPursuit", coder="omp", k=k, d=d, m=m, sign=sign, tol=tol)
    assert strict >= 12


@pytest.mark.parametrize("weight", ["fp32", "fp16"])
def test_pursuit_in_fp16(weight):
    assert check("SteerPursuit", coder="omp", k=6, d=48, m=96, activation="fp16", weight=weight) >= 12


def test_sae_with_fp16_weights_and_no_boost():
    assert check("SteerSae", coder="topk", k=6, d=48, m=96, weight="fp16", boost=False) >= 12


@pytest.mark.parametrize("activation", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("op_type", "coder", "k"),
    [
        ("SteerSae", "topk", 6),
        ("SteerSae", "jumprelu", 1),
        ("SteerSae", "none", 1),
        ("SteerPursuit", "omp", 8),
    ],
)
def test_int8_weights(op_type, coder, k, activation):
    assert check(op_type, coder=coder, k=k, d=48, m=96, activation=activation, weight="int8") >= 12


def test_bfloat16_weights():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(1)
    operands = operands_for("SteerPursuit", "omp", d=24, m=40, policies=3, weight="fp32", rng=rng)
    for name in ("analysis", "atoms"):
        operands[name] = operands[name].astype(ml_dtypes.bfloat16)
    z, slots = rows_for(rows=12, d=24, policies=3, activation="fp32", rng=rng)
    attributes = {"coder": "omp", "k": 4, "k_out": 2}
    function = steer_function("SteerPursuit", **attributes, weight="bf16")
    got = run(model_of("SteerPursuit", function, operands, activation="fp32", d=24, **attributes), z, slots)
    want = expected("SteerPursuit", z, slots, operands, **attributes)
    np.testing.assert_allclose(got.z, want.z, rtol=1e-4, atol=1e-4)


def test_metric_form():
    """Analysis differs from atoms: pursuit of W(z - mu) over W A, written as E = A WᵀW and b = -E mu."""
    rng = np.random.default_rng(3)
    d, n = 30, 60
    w = rng.normal(size=(d, d)) / d**0.5 + np.eye(d)
    atoms = rng.normal(size=(n, d))
    atoms /= np.linalg.norm(atoms @ w.T, axis=1, keepdims=True)
    mean = rng.normal(size=d)
    operands = operands_for("SteerPursuit", "omp", d=d, m=n, policies=4, weight="fp32", rng=rng)
    operands["atoms"] = atoms.astype(np.float32)
    operands["analysis"] = (atoms @ w.T @ w).astype(np.float32)
    operands["bias"] = (-(atoms @ w.T @ w) @ mean).astype(np.float32)
    z, slots = rows_for(rows=20, d=d, policies=4, activation="fp32", rng=rng)
    attributes = {"coder": "omp", "k": 8, "k_out": 8}
    function = steer_function("SteerPursuit", **attributes)
    got = run(model_of("SteerPursuit", function, operands, activation="fp32", d=d, **attributes), z, slots)
    want = expected("SteerPursuit", z, slots, operands, **attributes)
    strict = clear_rows(z, slots, operands, coder="omp", k=8)
    assert strict.sum() >= 12
    np.testing.assert_allclose(got.z[0][strict], want.z[0][strict], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got.support_index[0][strict], want.support_index[0][strict])


def test_exact_ties_go_to_the_lower_index():
    """Integer data, so that equal scores are equal in fp32 too."""
    atoms = np.zeros((6, 4), np.float32)
    atoms[[0, 1, 2, 3, 4, 5], [3, 1, 1, 2, 0, 2]] = 1
    z = np.array([[[0, 2, 2, 0], [2, 2, 2, 2]]], np.float32)
    slots = np.array([[2, 2]], np.int32)
    edit = {
        "gain": np.zeros((3, 6), np.float32),
        "undesirable": np.ones((3, 6), bool),
        "shift": np.zeros((3, 4), np.float32),
        "limits": np.zeros((3, 4), np.float32),
    }
    zero = np.zeros(6, np.float32)
    for op_type, big, attributes in (
        ("SteerSae", {"enc": atoms, "enc_bias": zero, "dec": atoms}, {"coder": "topk", "k": 3, "k_out": 3}),
        (
            "SteerPursuit",
            {"analysis": atoms, "bias": zero, "atoms": atoms},
            {"coder": "omp", "k": 3, "k_out": 3},
        ),
    ):
        operands = big | edit
        function = steer_function(op_type, **attributes)
        got = run(model_of(op_type, function, operands, activation="fp32", d=4, **attributes), z, slots)
        want = expected(op_type, z, slots, operands, **attributes)
        np.testing.assert_array_equal(got.support_index, want.support_index)
        np.testing.assert_allclose(got.z, want.z, atol=1e-6)


def test_duplicates_do_not_use_up_the_support():
    """Atoms inside the span of chosen ones are passed over, and further atoms are still found."""
    rng = np.random.default_rng(5)
    base, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    noisy = base[:4] + 1e-3 * base[4:8]
    atoms = np.concatenate([base[:4], noisy, base[8:]]).astype(np.float32)
    z = (base[:4].sum(0) * 5 + base[4:8].sum(0) + base[8:].sum(0) * 0.001).astype(np.float32)[None, None]
    slots = np.array([[2]], np.int32)
    n = len(atoms)
    operands = {
        "analysis": atoms,
        "bias": np.zeros(n, np.float32),
        "atoms": atoms,
        "gain": np.zeros((3, n), np.float32),
        "undesirable": np.ones((3, n), bool),
        "shift": np.zeros((3, 12), np.float32),
        "limits": np.zeros((3, 4), np.float32),
    }
    attributes = {"coder": "omp", "k": 8, "k_out": 8}
    function = steer_function("SteerPursuit", **attributes)
    got = run(model_of("SteerPursuit", function, operands, activation="fp32", d=12, **attributes), z, slots)
    want = expected("SteerPursuit", z, slots, operands, **attributes)
    assert set(want.support_index[0, 0]) >= {8, 9, 10, 11}
    np.testing.assert_array_equal(np.sort(got.support_index), np.sort(want.support_index))


@pytest.mark.parametrize(("op_type", "coder"), [("SteerSae", "topk"), ("SteerPursuit", "omp")])
def test_rows_of_extreme_size(op_type, coder):
    """Squares of these leave the range of fp32; the rows are finite, and so is everything about them."""
    rng = np.random.default_rng(17)
    operands = operands_for(op_type, coder, d=20, m=40, policies=4, weight="fp32", rng=rng)
    operands["limits"][:] = [0, 0.3, 1, 0]
    z = rng.normal(size=(1, 2, 20)).astype(np.float32) * np.array([1e28, 1e-28], np.float32)[None, :, None]
    slots = np.full((1, 2), 2, np.int32)
    for name in ("bias", "enc_bias", "boost", "shift"):
        operands[name] = np.zeros_like(operands[name]) if name in operands else None
    operands = {name: array for name, array in operands.items() if array is not None}
    attributes = {"coder": coder, "k": 4, "k_out": 4}
    function = steer_function(op_type, **attributes)
    got = run(model_of(op_type, function, operands, activation="fp32", d=20, **attributes), z, slots)
    want = expected(op_type, z, slots, operands, **attributes)
    np.testing.assert_allclose(got.z, want.z, rtol=1e-4, atol=0)
    np.testing.assert_allclose(got.doses, want.doses, rtol=1e-4)
    np.testing.assert_array_equal(got.support_index, want.support_index)


def test_empty_batch_and_long_prompt():
    rng = np.random.default_rng(7)
    operands = operands_for("SteerPursuit", "omp", d=16, m=32, policies=3, weight="fp32", rng=rng)
    attributes = {"coder": "omp", "k": 3, "k_out": 2}
    function = steer_function("SteerPursuit", **attributes)
    proto = model_of("SteerPursuit", function, operands, activation="fp32", d=16, **attributes)
    empty = run(proto, np.zeros((2, 0, 16), np.float32), np.zeros((2, 0), np.int32))
    assert empty.z.shape == (2, 0, 16)
    assert empty.doses.shape == (2, 0, 2)
    z = rng.normal(size=(2, 50, 16)).astype(np.float32)
    slots = np.full((2, 50), 2, np.int32)
    whole = run(proto, z, slots)
    one = run(proto, z[1:, 20:21], slots[1:, 20:21])
    np.testing.assert_allclose(whole.z[1:, 20:21], one.z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("op_type", "coder"), [("SteerSae", "topk"), ("SteerSae", "jumprelu"), ("SteerPursuit", "omp")]
)
def test_reference_evaluator_agrees(op_type, coder):
    """ONNX's own evaluator reads the same meaning into the function as ONNX Runtime."""
    rng = np.random.default_rng(11)
    operands = operands_for(op_type, coder, d=10, m=18, policies=4, weight="fp32", rng=rng)
    z, slots = rows_for(rows=10, d=10, policies=4, activation="fp32", rng=rng)
    attributes = {"coder": coder, "k": 3, "k_out": 4}
    proto = model_of(
        op_type, steer_function(op_type, **attributes), operands, activation="fp32", d=10, **attributes
    )
    with np.errstate(all="ignore"):
        got = ReferenceEvaluator(proto).run(None, {"z": z, "slots": slots})
    want = run(proto, z, slots)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("SteerSae", {"coder": "topk", "k": 5}),
        ("SteerSae", {"coder": "relu", "k": 0}),
        ("SteerPursuit", {"coder": "omp", "k": 8}),
        ("SteerPursuit", {"coder": "omp", "k": 16, "sign": "signed"}),
    ],
)
def test_custom_operator_agrees_on_the_same_file(op_type, attributes, weight):
    """With the library registered, the same bytes run our kernels."""
    from daco_rt import _native

    try:
        library = _native.library_path("onnxruntime")
    except DacoError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(13)
    operands = operands_for(op_type, attributes["coder"], d=48, m=100, policies=5, weight=weight, rng=rng)
    z, slots = rows_for(rows=40, d=48, policies=5, activation="fp32", rng=rng)
    attributes = {**attributes, "k_out": 4}
    proto = model_of(
        op_type,
        steer_function(op_type, **attributes, weight=weight),
        operands,
        activation="fp32",
        d=48,
        **attributes,
    )
    portable = run(proto, z, slots)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    native = reference.Steered(*session.run(None, {"z": z, "slots": slots}))

    strict = clear_rows(z, slots, operands, **{k: v for k, v in attributes.items() if k != "k_out"})
    strict &= np.isfinite(z[0]).all(-1)
    assert strict.sum() >= 20
    norm = np.maximum(np.linalg.norm(z[0], axis=1), 1e-30)
    with np.errstate(invalid="ignore"):
        error = np.linalg.norm(portable.z[0] - native.z[0], axis=1) / norm
    assert error[strict].max() <= 1e-5
    np.testing.assert_array_equal(np.isnan(portable.doses), np.isnan(native.doses))
    np.testing.assert_allclose(portable.doses[0][strict], native.doses[0][strict], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(portable.support_index[0][strict], native.support_index[0][strict])


def test_size_of_the_largest_function():
    function = steer_function("SteerPursuit", coder="omp", k=16, k_out=8)
    assert len(list(function)) < 800
    assert {node.domain for node in function} == {""}
