"""The custom-op library in ONNX Runtime: numbers, schema, absent operands, refusals, concurrency."""

from __future__ import annotations

import threading

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_nodes import ATTRIBUTES, DOMAIN, INPUTS, OUTPUTS, expected, make_model, run, session
from steer_cases import assert_steered, steer_case


@pytest.mark.parametrize("activation", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("weight", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("op", INPUTS)
def test_equals_reference(op, weight, activation):
    case = steer_case(op, activation=activation, weight=weight, rows=(2, 5))
    got = run(session(make_model(op, case)), case)
    assert_steered(got, expected(op, case), case["z"], activation)


@pytest.mark.parametrize("coder", ["relu", "jumprelu", "none"])
def test_other_coders(coder):
    case = steer_case("sae", rows=(2, 5))
    got = run(session(make_model("sae", case, coder=coder)), case)
    assert_steered(got, expected("sae", case, coder=coder), case["z"], "fp32")


@pytest.mark.parametrize("weight", ["fp32", "int8"])
@pytest.mark.parametrize("sign", ["positive", "signed"])
def test_elastic_net(sign, weight):
    case = steer_case("pursuit", weight=weight, rows=(2, 5))
    options = {"coder": "elastic_net", "k": 1, "sign": sign, "tau": 0.8, "alpha": 0.1}
    options = {name: float(np.float32(x)) if isinstance(x, float) else x for name, x in options.items()}
    got = run(session(make_model("pursuit", case, **options)), case)
    assert_steered(got, expected("pursuit", case, **options), case["z"], "fp32")


def test_quantised_weights_come_with_scales():
    case = steer_case("sae", weight="int8")
    del case["scales"]
    with pytest.raises(Exception, match=r"steer_sae: scales must be given with int8 weights, shape \(2, m\)"):
        run(session(make_model("sae", case, rank=2)), case)


@pytest.mark.parametrize("gram", ["float32", "float16", "fed", "none"])
def test_where_the_gram_matrix_comes_from(gram):
    """Given as an initialiser or an input, built from constant matrices, or not at all."""
    case = steer_case("pursuit", rows=(2, 5))
    want = expected("pursuit", case)
    e, a = case["analysis"].astype(np.float64), case["atoms"].astype(np.float64)
    fed = ("z", "slots")
    if gram == "none":
        fed = (*fed, "analysis", "atoms")
    else:
        case["gram"] = (e @ a.T).astype("float16" if gram == "float16" else "float32")
        fed = (*fed, "gram") if gram == "fed" else fed
    got = run(session(make_model("pursuit", case, fed=fed)), case)
    assert_steered(got, want, case["z"], "fp32")


def test_a_large_gram_matrix_is_built_in_threads_and_fp16():
    case = steer_case("pursuit", rows=(1, 4), d=16, m=4100)
    case["slots"][:], case["gain"][2] = 2, 0.0
    residual = np.linalg.norm(run(session(make_model("pursuit", case)), case)[0], axis=-1)
    best = np.linalg.norm(expected("pursuit", case).z, axis=-1)
    # fp16 may pick another of two nearly equal atoms; what is left over hardly changes.
    assert (best > 0).all() and (residual <= 1.05 * best + 1e-4).all()


def test_a_given_gram_matrix_is_used():
    case = steer_case("pursuit", rows=(2, 5))
    wrong = {**case, "gram": 2.0 * np.eye(80, dtype=np.float32)}
    got = run(session(make_model("pursuit", wrong)), wrong)
    assert not np.allclose(got[0], expected("pursuit", case).z, atol=1e-3)
    # Zero elements mean "absent", as for every other host.
    empty = {**case, "gram": np.zeros((0, 0), np.float32)}
    assert_steered(
        run(session(make_model("pursuit", empty)), empty), expected("pursuit", case), case["z"], "fp32"
    )


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("activation", ["fp32", "fp16"])
def test_types_and_shapes_are_inferred(op, activation):
    s = session(make_model(op, steer_case(op, activation=activation, rows=(2, 5))))
    got = [(o.type, o.shape) for o in s.get_outputs()]
    element = "tensor(float)" if activation == "fp32" else "tensor(float16)"
    assert got == [
        (element, ["B", "S", 48]),
        ("tensor(float)", ["B", "S", 2]),
        ("tensor(int32)", ["B", "S", 4]),
        ("tensor(float)", ["B", "S", 4]),
    ]


@pytest.mark.parametrize("op", INPUTS)
def test_unused_outputs(op):
    case = steer_case(op, rows=(2, 5))
    del case["boost"]
    case.pop("threshold", None)
    want = expected(op, case)
    for outputs in (
        ("new_z",),
        ("new_z", "doses"),
        ("new_z", "", "support_index"),
        ("new_z", "", "", "support_value"),
    ):
        got = run(session(make_model(op, case, outputs=outputs)), case)
        names = [name for name in outputs if name]
        by_name = dict(zip(OUTPUTS, want, strict=True))
        assert len(got) == len(names)
        for name, value in zip(names, got, strict=True):
            np.testing.assert_allclose(value, by_name[name], atol=2e-4)
    got = run(session(make_model(op, case, outputs=("new_z", "doses"), k_out=0)), case)
    np.testing.assert_allclose(got[1], want.doses, atol=1e-4)


@pytest.mark.parametrize("op", INPUTS)
def test_no_rows_one_row_and_two_axes(op):
    case = steer_case(op, rows=(1, 0))
    shapes = [o.shape for o in run(session(make_model(op, case)), case)]
    assert shapes == [(1, 0, 48), (1, 0, 2), (1, 0, 4), (1, 0, 4)]
    case = steer_case(op, rows=(1,))
    got = run(session(make_model(op, case, rank=2)), case)
    assert_steered(got, expected(op, case), case["z"], "fp32")


@pytest.mark.parametrize("op", INPUTS)
def test_slots_out_of_range_and_bad_rows(op):
    case = steer_case(op, rows=(1, 4))
    case["slots"][0, :2] = -1, 5
    case["z"][0, 2, 7] = np.nan
    got = run(session(make_model(op, case)), case)
    assert np.isnan(got[0][0, :2]).all() and np.isnan(got[1][0, :3]).all()
    np.testing.assert_array_equal(got[0][0, 2].view(np.int32), case["z"][0, 2].view(np.int32))
    assert (got[2][0, :3] == -1).all()


@pytest.mark.parametrize("op", INPUTS)
def test_untouched_rows_are_copied_bit_for_bit(op):
    case = steer_case(op, rows=(2, 5))
    case["slots"][:] = [[0, 1, 0, 1, 0]] * 2
    got = run(session(make_model(op, case)), case)
    np.testing.assert_array_equal(got[0].view(np.int32), case["z"].view(np.int32))


def test_the_output_may_take_the_place_of_z():
    """A producer before the node lets ONNX Runtime reuse its buffer; the input of the graph stays intact."""
    case = steer_case("sae", rows=(2, 5))
    model = make_model("sae", case)
    double = helper.make_node("Add", ["z", "z"], ["twice"])
    model.graph.node[0].input[0] = "twice"
    model.graph.node.insert(0, double)
    z = case["z"].copy()
    got = run(session(model), case)
    np.testing.assert_array_equal(case["z"], z)
    doubled = {**case, "z": 2 * z}
    assert_steered(got, expected("sae", doubled), doubled["z"], "fp32")


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        ("sae", {"coder": "top"}, "SteerSae: coder must be one of topk, relu, jumprelu, none, got 'top'"),
        ("sae", {"coder": None}, "SteerSae: attribute coder must be a string; node 'steer' has none"),
        ("sae", {"k": 2.5}, "SteerSae: attribute k must be an integer"),
        ("sae", {"k": 0}, "SteerSae: k must be at least 1, got 0"),
        ("sae", {"k_out": -1}, "SteerSae: k_out must be at least 0, got -1"),
        ("pursuit", {"sign": "plus"}, "SteerPursuit: sign must be one of positive, signed, nnls, got 'plus'"),
        ("pursuit", {"tol": 1}, "SteerPursuit: attribute tol must be a float"),
    ],
)
def test_bad_attributes_fail_when_the_session_is_built(op, attributes, message):
    with pytest.raises(Exception, match=message):
        session(make_model(op, steer_case(op), rank=2, **attributes))


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (
            "sae",
            {"gain": np.ones((5, 79), np.float32)},
            r"gain must have shape \(P, m\) with m=80, got",
        ),
        ("sae", {"dec": np.ones((80, 48), np.float16)}, "dec must be fp32 like enc, got float16"),
        (
            "sae",
            {"enc": np.ones((80, 48), np.int32)},
            r"enc must be fp32, fp16, bf16, int8 or fp8 \(e4m3\), got",
        ),
        ("pursuit", {"bias": np.ones(4, np.float32)}, r"bias must have shape \(m,\) with m=80, got \(4,\)"),
        ("pursuit", {"gram": np.ones((80, 8), np.float32)}, r"gram must have shape \(m, m\) with m=80"),
    ],
)
def test_operands_that_do_not_fit(op, change, message):
    case = {**steer_case(op), **change}
    s = session(make_model(op, case, rank=2))
    with pytest.raises(Exception, match=f"steer_{op}: {message}"):
        run(s, case)


def test_k_above_m():
    case = steer_case("sae")
    with pytest.raises(Exception, match="k must be at most the number of atoms m=80, got 81"):
        run(session(make_model("sae", case, rank=2, k=81)), case)


@pytest.mark.parametrize("op", INPUTS)
def test_concurrent_runs(op):
    """Three threads on two sessions, each with its own rows: nothing is shared between calls."""
    cases = [steer_case(op, rows=(3, 5 + i), seed=7) for i in range(3)]
    for i, case in enumerate(cases):
        case["z"] = case["z"] * np.float32(1 + i)
    model = make_model(op, cases[0])
    sessions = [session(model), session(model, threads=1)]
    wanted = [expected(op, {**cases[0], "z": c["z"], "slots": c["slots"]}) for c in cases]
    failures: list[Exception] = []

    def work(i: int) -> None:
        try:
            for turn in range(20):
                got = run(sessions[(i + turn) % 2], cases[i])
                assert_steered(got, wanted[i], cases[i]["z"], "fp32")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures[0]


def negating_function(op: str) -> onnx.FunctionProto:
    """A stand-in for the fallback, with an answer that tells who ran."""
    return helper.make_function(
        DOMAIN,
        f"Steer{op.capitalize()}",
        INPUTS[op],
        OUTPUTS,
        [
            helper.make_node("Neg", ["z"], ["new_z"]),
            helper.make_node("Cast", ["z"], ["doses"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["z"], ["support_index"], to=TensorProto.INT32),
            helper.make_node("Cast", ["z"], ["support_value"], to=TensorProto.FLOAT),
        ],
        [helper.make_opsetid("", 24)],
        attributes=[*ATTRIBUTES[op], "plugin_namespace", "plugin_version"],
    )


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("activation", ["fp32", "fp16"])
def test_the_kernel_takes_over_from_a_local_function(op, activation):
    case = steer_case(op, activation=activation, rows=(2, 5))
    del case["boost"]
    model = make_model(op, case, functions=[negating_function(op)])
    got = run(session(model), case)
    assert_steered(got, expected(op, case), case["z"], activation)
    without = run(session(model, library=False), case)
    np.testing.assert_array_equal(without[0], -case["z"])
