"""The operators in ONNX Runtime's CUDA provider against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from steer_cases import assert_steered, steer_case

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from onnx_nodes import INPUTS, expected, make_model, run, session  # noqa: E402

from daco_rt._native import library_path  # noqa: E402
from daco_rt.errors import DacoError  # noqa: E402

ACTIVATIONS = ("fp32", "fp16", "bf16")


@pytest.fixture
def provider(device: str) -> str:
    """The provider that all nodes must run in."""
    try:
        library_path("onnxruntime")
    except DacoError as error:
        pytest.skip(str(error))
    name = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
    if name not in ort.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {name}; it comes with onnxruntime-gpu")
    return name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", [*ACTIVATIONS, "int8"])
@pytest.mark.parametrize("op", INPUTS)
def test_equals_reference(provider: str, op: str, weight: str, activation: str):
    case = steer_case(op, activation=activation, weight=weight, rows=(2, 5))
    got = run(session(make_model(op, case), provider=provider), case)
    assert_steered(got, expected(op, case), case["z"], activation)


@pytest.mark.parametrize("coder", ["relu", "jumprelu", "none"])
def test_other_coders(provider: str, coder: str):
    case = steer_case("sae", rows=(2, 5))
    got = run(session(make_model("sae", case, coder=coder), provider=provider), case)
    assert_steered(got, expected("sae", case, coder=coder), case["z"], "fp32")


@pytest.mark.parametrize("gram", ["built", "given", "none"])
def test_where_the_gram_matrix_comes_from(provider: str, gram: str):
    """Built from constant matrices when the session opens, given as an input, or not at all."""
    case = steer_case("pursuit", rows=(2, 5))
    want = expected("pursuit", case)
    fed = ("z", "slots")
    if gram == "given":
        exact = case["analysis"].astype(np.float64) @ case["atoms"].astype(np.float64).T
        case["gram"], fed = exact.astype(np.float32), (*fed, "gram")
    elif gram == "none":
        fed = (*fed, "analysis", "atoms")
    got = run(session(make_model("pursuit", case, fed=fed), provider=provider), case)
    assert_steered(got, want, case["z"], "fp32")


@pytest.mark.parametrize("op", INPUTS)
def test_a_session_follows_its_inputs(provider: str, op: str):
    """Rows, slots and policies of one session change from run to run, and so does the number of rows."""
    fed = ("z", "slots", "gain", "boost", "undesirable", "shift", "limits")
    cases = [steer_case(op, rows=rows, seed=3) for rows in ((2, 5), (1, 1), (3, 30))]
    opened = session(make_model(op, cases[0], fed=fed), provider=provider)
    for at, case in enumerate(cases):
        case |= {name: held for name, held in cases[0].items() if name not in fed}
        case["gain"] = np.roll(case["gain"], at, axis=1)
        case["undesirable"] = case["gain"] < 0.5
        assert_steered(run(opened, case), expected(op, case), case["z"], "fp32")
