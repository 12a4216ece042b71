"""Affine edits in every host: torch (eager, traced, exported), ONNX Runtime's library, the ONNX function."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from steer_cases import DTYPES, TOLERANCE

from daco_rt import _native, ops
from daco_rt.ops import numpy as numpy_ops
from daco_rt.ops import reference
from daco_rt.ops.onnx_functions import affine_function

INPUTS = ("z", "slots", "a", "a_bias", "b", "shift", "limits")
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ELEMENT = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
PHIS = ("identity", "relu", "clamp")
CLAMP = (-0.5, 0.25)


def affine_case(*, activation="fp32", weight="fp32", rows=(2, 8), d=48, r=3, seed=0):
    """Five policies: 2 free, 3 capped, 4 keeps norms; all kinds of rows."""
    rng = np.random.default_rng(seed)
    z = (2 * rng.normal(size=(*rows, d))).astype(DTYPES[activation])
    slots = np.resize(np.array([2, 3, 4, 1, 0, 3, 4, 2], np.int32), rows)
    limits = np.zeros((5, 4), np.float32)
    limits[3, 1], limits[4, 2] = 0.2, 1
    return {
        "z": z,
        "slots": slots,
        "a": (rng.normal(size=(5, r, d)) / d**0.5).astype(DTYPES[weight]),
        "a_bias": (0.3 * rng.normal(size=(5, r))).astype(np.float32),
        "b": (rng.normal(size=(5, d, r)) / r**0.5).astype(DTYPES[weight]),
        "shift": (0.1 * rng.normal(size=(5, d))).astype(np.float32),
        "limits": limits,
    }


def as_torch(a):
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(a.copy())


def tensors(**options):
    return {name: as_torch(a) for name, a in affine_case(**options).items()}


def assert_edited(got, want, z, activation="fp32"):
    new_z, doses = (np.asarray(x).astype(np.float64) for x in got)
    norm = np.linalg.norm(z.astype(np.float64), axis=-1, keepdims=True)
    assert (np.abs(new_z - want.z) / norm).max() <= TOLERANCE[activation]
    np.testing.assert_allclose(doses, want.doses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("weight", TORCH)
@pytest.mark.parametrize("phi", PHIS)
def test_torch_equals_reference(phi, weight, activation):
    case = affine_case(activation=activation, weight=weight)
    out = ops.steer_affine(**{name: as_torch(a) for name, a in case.items()}, phi=phi, clamp=CLAMP)
    assert isinstance(out, ops.SteeredAffine) and out.z.dtype == TORCH[activation]
    want = reference.steer_affine(**case, phi=phi, clamp=CLAMP)
    assert_edited((out.z.float(), out.doses), want, case["z"], activation)
    native = numpy_ops.steer_affine(**case, phi=phi, clamp=CLAMP)
    assert torch.equal(as_torch(native.z), out.z) and torch.equal(as_torch(native.doses), out.doses)


def test_opcheck():
    arguments = tuple(tensors().values())
    options = {"phi": "clamp", "low": -0.5, "high": 0.25}
    torch.library.opcheck(torch.ops.daco.steer_affine.default, arguments, options)


class Block(torch.nn.Module):
    """A block whose output is edited, as in a model."""

    def __init__(self, case):
        super().__init__()
        self.names = INPUTS[2:]
        for name in self.names:
            self.register_buffer(name, case[name])

    def forward(self, z, slots):
        return tuple(
            ops.steer_affine(z * 2.0, slots, **{n: getattr(self, n) for n in self.names}, phi="relu")
        )


def test_compile_and_export():
    case = tensors()
    block = Block(case)
    with torch.no_grad():
        want = block(case["z"], case["slots"])
        got = torch.compile(block, fullgraph=True, backend="aot_eager")(case["z"], case["slots"])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    program = torch.export.export(
        block,
        (case["z"], case["slots"]),
        dynamic_shapes={"z": {0: batch, 1: tokens}, "slots": {0: batch, 1: tokens}},
    )
    z, slots = case["z"].repeat(2, 2, 1), case["slots"].repeat(2, 2)
    for a, b in zip(program.module()(z, slots), block(z, slots), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": (5, 48)}, ValueError, r"a must have shape \(P, r, d\) with d=48, r >= 1 and P >= 2"),
        ({"a_bias": (5, 4)}, ValueError, r"a_bias must have shape \(P, r\) with P=5, r=3, got \(5, 4\)"),
        ({"b": (5, 3, 48)}, ValueError, r"b must have shape \(P, d, r\) with P=5, d=48, r=3"),
        ({"shift": (4, 48)}, ValueError, r"shift must have shape \(P, d\) with P=5, d=48"),
        ({"limits": (5, 3)}, ValueError, r"limits must have shape \(P, 4\) with P=5"),
        ({"phi": "tanh"}, ValueError, "phi must be 'identity', 'relu' or 'clamp', got 'tanh'"),
        ({"phi": "clamp", "clamp": (1.0, 0.0)}, ValueError, r"clamp must be \(low, high\) with low <= high"),
        ({"b": torch.float16}, TypeError, "b must have dtype float32 like a, got float16"),
        ({"a": torch.int8}, TypeError, "a must be float32, float16 or bfloat16, got int8"),
    ],
)
def test_misuse(change, error, message):
    case = tensors()
    for name, value in change.items():
        if isinstance(value, torch.dtype):
            case[name] = case[name].to(value)
        else:
            case[name] = torch.zeros(value) if name in INPUTS else value
    with pytest.raises(error, match=f"steer_affine: {message}"):
        ops.steer_affine(**case)
    arrays = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    with pytest.raises(error, match=f"steer_affine: {message}"):
        numpy_ops.steer_affine(**arrays)


def make_model(case, *, activation="fp32", functions=(), **attributes):
    attributes = {"phi": "clamp", "clamp": list(CLAMP), "plugin_namespace": "ai.daco"} | attributes
    node = helper.make_node(
        "SteerAffine", INPUTS, ["new_z", "doses"], domain="ai.daco", name="edit",
        **{name: value for name, value in attributes.items() if value is not None},
    )  # fmt: skip
    d = case["z"].shape[-1]
    elements = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    graph = helper.make_graph(
        [node],
        "edited",
        [
            helper.make_tensor_value_info("z", ELEMENT[activation], ["B", "S", d]),
            helper.make_tensor_value_info("slots", TensorProto.INT32, ["B", "S"]),
        ],
        [onnx.ValueInfoProto(name=name) for name in ("new_z", "doses")],
        [
            helper.make_tensor(name, ELEMENT[elements[a.dtype.name]], a.shape, a.tobytes(), raw=True)
            for name, a in case.items()
            if name not in ("z", "slots")
        ],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("ai.daco", 1)]
    return helper.make_model(graph, ir_version=11, opset_imports=opsets, functions=list(functions))


def session(model, *, library=True):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(_native.library_path("onnxruntime")))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("activation", ["fp32", "fp16"])
@pytest.mark.parametrize("weight", TORCH)
@pytest.mark.parametrize("phi", PHIS)
def test_onnx_library_and_function_equal_reference(phi, weight, activation):
    case = affine_case(activation=activation, weight=weight, rows=(2, 9))
    case["slots"][0, :2] = -1, 5
    case["z"][0, 2, 7] = np.nan
    case["slots"][0, 2] = 2
    function = ir.to_proto(affine_function(phi=phi, clamp=CLAMP, activation=activation, weight=weight))
    model = make_model(case, activation=activation, functions=[function], phi=phi)
    want = reference.steer_affine(**case, phi=phi, clamp=CLAMP)
    for library in (True, False):
        s = session(model, library=library)
        if library:
            assert [(o.shape) for o in s.get_outputs()] == [["B", "S", 48], ["B", "S", 2]]
        new_z, doses = s.run(None, {"z": case["z"], "slots": case["slots"]})
        assert np.isnan(new_z[0, :2].astype(np.float32)).all() and np.isnan(doses[0, :3]).all()
        same = case["slots"] < 2
        same[0, :2], same[0, 2] = False, True
        np.testing.assert_array_equal(new_z[same].view(np.uint8), case["z"][same].view(np.uint8))
        rest = (slice(1, 2), slice(None))
        picked = reference.SteeredAffine(want.z[rest], want.doses[rest])
        assert_edited((new_z[rest], doses[rest]), picked, case["z"][rest], activation)


def test_the_function_means_the_same_to_another_evaluator():
    case = affine_case()
    model = make_model(case, functions=[ir.to_proto(affine_function(phi="relu"))], phi="relu")
    with np.errstate(all="ignore"):
        got = ReferenceEvaluator(model).run(None, {"z": case["z"], "slots": case["slots"]})
    assert_edited(got, reference.steer_affine(**case, phi="relu"), case["z"])


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"phi": "tanh"}, "SteerAffine: phi must be one of identity, relu, clamp, got 'tanh'"),
        ({"phi": None}, "SteerAffine: attribute phi must be a string; node 'edit' has none"),
        ({"clamp": None}, "SteerAffine: attribute clamp must be a list of floats"),
        ({"clamp": [1.0]}, r"SteerAffine: attribute clamp must be \[low, high\], got 1 number"),
    ],
)
def test_bad_attributes_fail_when_the_session_is_built(attributes, message):
    with pytest.raises(Exception, match=message):
        session(make_model(affine_case(), **attributes))


def test_wrong_attributes_of_the_function():
    with pytest.raises(
        ValueError, match="affine_function: phi must be one of identity, relu, clamp, got 'x'"
    ):
        affine_function(phi="x")
    with pytest.raises(ValueError, match="affine_function: clamp must be"):
        affine_function(phi="clamp", clamp=(1.0, 0.0))
    with pytest.raises(ValueError, match="affine_function: weight must be one of fp32, fp16, bf16"):
        affine_function(weight="int8")
