"""The torch operators: numbers, tracing, layouts, and what they say about misuse."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from steer_cases import assert_steered, steer_case
from torch._subclasses.fake_tensor import FakeTensorMode

from daco_rt import ops
from daco_rt.ops import reference

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FUNCTIONS = {"sae": ops.steer_sae, "pursuit": ops.steer_pursuit}
REFERENCES = {"sae": reference.steer_sae, "pursuit": reference.steer_pursuit}


def as_torch(a: np.ndarray) -> torch.Tensor:
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(a.copy())


def as_numpy(t: torch.Tensor, like: np.ndarray | None = None) -> np.ndarray:
    return t.view(torch.uint16).numpy().view(like.dtype) if t.dtype == torch.bfloat16 else t.numpy()


def run(op: str, case: dict, **options) -> tuple[np.ndarray, ...]:
    out = FUNCTIONS[op](**{k: as_torch(v) for k, v in case.items()}, **options)
    assert isinstance(out, ops.Steered)
    return (as_numpy(out.z, case["z"]), *(as_numpy(t) for t in out[1:]))


def tensors(op: str, **options) -> dict[str, torch.Tensor]:
    return {k: as_torch(v) for k, v in steer_case(op, **options).items()}


@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("weight", [*TORCH, "int8"])
@pytest.mark.parametrize("coder", ["topk", "relu", "jumprelu", "none"])
def test_sae_equals_reference(activation, weight, coder):
    case = steer_case("sae", activation=activation, weight=weight, rows=(2, 5))
    options = {"coder": coder, "k": 8, "k_out": 4}
    want = reference.steer_sae(**case, **options)
    assert_steered(run("sae", case, **options), want, case["z"], activation)


@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("weight", [*TORCH, "int8"])
@pytest.mark.parametrize("sign", ["positive", "signed", "nnls"])
def test_pursuit_equals_reference(activation, weight, sign):
    case = steer_case("pursuit", activation=activation, weight=weight, rows=(2, 5))
    options = {"k": 6, "k_out": 4, "sign": sign}
    want = reference.steer_pursuit(**case, **options)
    assert_steered(run("pursuit", case, **options), want, case["z"], activation)
    scales = as_torch(case["scales"]) if weight == "int8" else None
    gram = ops.build_gram(as_torch(case["analysis"]), as_torch(case["atoms"]), scales=scales).numpy()
    assert_steered(run("pursuit", {**case, "gram": gram}, **options), want, case["z"], activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weight", TORCH)
def test_build_gram(weight, dtype):
    case = tensors("pursuit", weight=weight)
    e = case["analysis"]
    a = e.roll(1, 0)
    got = ops.build_gram(e, a, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), e.double() @ a.double().T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_policy_moves_rows_and_off_and_observe_do_not(op):
    case = tensors(op, rows=(10,))
    out = FUNCTIONS[op](**case, k=8)
    moved = (out.z != case["z"]).any(-1)
    assert moved[case["slots"] >= 2].all()
    assert not moved[case["slots"] < 2].any()
    assert (out.doses[case["slots"] == 1, 0] > 0).all()


@pytest.mark.parametrize("op", FUNCTIONS)
def test_bad_rows_and_slots(op):
    case = tensors(op, rows=(4,))
    case["z"][1, 3] = float("nan")
    case["z"][2, 5] = float("inf")
    case["slots"] = torch.tensor([-1, 2, 3, 5], dtype=torch.int32)
    out = FUNCTIONS[op](**case, k=8, k_out=3)
    assert out.z[[0, 3]].isnan().all()
    assert torch.equal(out.z[1:3].view(torch.int32), case["z"][1:3].view(torch.int32))
    assert out.doses.isnan().all()
    assert (out.support_index == -1).all() and (out.support_value == 0).all()


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("rows", [(0,), (2, 0)])
def test_no_rows(op, rows):
    out = FUNCTIONS[op](**tensors(op, rows=rows), k=8, k_out=3)
    assert out.z.shape == (*rows, 48)
    assert out.doses.shape == (*rows, 2)
    assert out.support_index.shape == out.support_value.shape == (*rows, 3)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_layouts_do_not_matter(op):
    """Row strides, column strides, shifted storage and expanded rows all give the packed result."""
    case = tensors(op, rows=(3, 4))
    want = FUNCTIONS[op](**case, k=8, k_out=2)
    z = case["z"]
    wide = torch.full((3, 6, 51), 7.0)
    wide[:, 2:, 3:] = z
    odd = torch.empty(z.numel() + 1)[1:].view(z.shape).copy_(z)
    for layout in (
        wide[:, 2:, 3:],
        z.transpose(0, 1).contiguous().transpose(0, 1),
        z.transpose(1, 2).contiguous().transpose(1, 2),
        odd,
    ):
        assert torch.equal(layout, z)
        for got, expected in zip(FUNCTIONS[op](**{**case, "z": layout}, k=8, k_out=2), want, strict=True):
            assert got.is_contiguous() and torch.equal(got, expected)
    for name in case:
        if name != "z" and case[name].dim() == 2:
            turned = case[name].T.contiguous().T
            assert torch.equal(FUNCTIONS[op](**{**case, name: turned}, k=8).z, want.z), name
    one = {**case, "z": z[:1, :1].expand(3, 4, -1), "slots": torch.full((3, 4), 2, dtype=torch.int32)}
    assert torch.equal(
        FUNCTIONS[op](**one, k=8).z, FUNCTIONS[op](**{**one, "z": one["z"].contiguous()}, k=8).z
    )


@pytest.mark.parametrize("op", FUNCTIONS)
def test_one_row_without_further_axes(op):
    case = tensors(op, rows=(1,))
    want = FUNCTIONS[op](**case, k=8, k_out=2)
    got = FUNCTIONS[op](**{**case, "z": case["z"][0], "slots": case["slots"][0]}, k=8, k_out=2)
    assert [tuple(x.shape) for x in got] == [(48,), (2,), (2,), (2,)]
    assert all(torch.equal(a, b[0]) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_threads_do_not_change_the_result(op):
    case = tensors(op, rows=(33,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = FUNCTIONS[op](**case, k=8, k_out=4)
        torch.set_num_threads(3)
        three = FUNCTIONS[op](**case, k=8, k_out=4)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def raw_arguments(op: str, **options) -> tuple[tuple[torch.Tensor, ...], dict]:
    case = tensors(op, **options)
    empty = torch.empty(0)
    first = ("enc", "enc_bias", "dec", "threshold") if op == "sae" else ("analysis", "bias", "gram", "atoms")
    rest = ("gain", "boost", "undesirable", "shift", "limits", "scales")
    args = tuple(case.get(name, empty) for name in ("z", "slots", *first, *rest))
    if op == "sae":
        return args, {"coder": "topk", "k": 8, "k_out": 3}
    return args, {
        "coder": "omp", "k": 8, "sign": "positive", "tol": 0.0, "tau": 0.95, "alpha": 0.05, "k_out": 3,
    }  # fmt: skip


@pytest.mark.parametrize("op", FUNCTIONS)
def test_opcheck(op):
    args, kwargs = raw_arguments(op, rows=(2, 3))
    torch.library.opcheck(getattr(torch.ops.daco, f"steer_{op}").default, args, kwargs)


def test_opcheck_gram():
    case = tensors("pursuit")
    arguments = (case["analysis"], case["atoms"], torch.empty(0))
    torch.library.opcheck(torch.ops.daco.build_gram.default, arguments, {"dtype": torch.float16})


class Steer(torch.nn.Module):
    """A block whose output is steered, as in a model."""

    def __init__(self, op: str, case: dict[str, torch.Tensor]):
        super().__init__()
        self.op = op
        self.names = [name for name in case if name not in ("z", "slots")]
        for name in self.names:
            self.register_buffer(name, case[name])

    def forward(self, z: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        operands = {name: getattr(self, name) for name in self.names}
        return tuple(FUNCTIONS[self.op](z * 2.0, slots, **operands, k=8, k_out=2))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_compile_whole_graph(op):
    case = tensors(op, rows=(2, 3))
    block = Steer(op, case)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = block(case["z"], case["slots"])
        got = compiled(case["z"], case["slots"])
        longer = compiled(case["z"].repeat(1, 2, 1), case["slots"].repeat(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(longer[0][:, :3], want[0])


@pytest.mark.parametrize("op", FUNCTIONS)
def test_export_with_dynamic_rows(op):
    case = tensors(op, rows=(2, 3))
    block = Steer(op, case)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    program = torch.export.export(
        block,
        (case["z"], case["slots"]),
        dynamic_shapes={"z": {0: batch, 1: tokens}, "slots": {0: batch, 1: tokens}},
    )
    z, slots = case["z"].repeat(2, 2, 1), case["slots"].repeat(2, 2)
    for a, b in zip(program.module()(z, slots), block(z, slots), strict=True):
        assert torch.equal(a, b)
    assert any(f"daco.steer_{op}" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_quantised_weights_come_with_scales(op):
    case = tensors(op, weight="int8")
    scales = case.pop("scales")
    with pytest.raises(
        ValueError, match=rf"steer_{op}: scales must be given with int8 weights, shape \(2, m\)"
    ):
        FUNCTIONS[op](**case, k=8)
    with pytest.raises(
        ValueError, match=rf"steer_{op}: scales must have shape \(2, m\) with m=80, got \(80,\)"
    ):
        FUNCTIONS[op](**case, scales=scales[0], k=8)
    with pytest.raises(ValueError, match=f"steer_{op}: scales must be None with float32 weights"):
        FUNCTIONS[op](**tensors(op), scales=scales, k=8)
    big = ("enc", "dec") if op == "sae" else ("analysis", "atoms")
    for name in big:
        case[name] = torch.zeros(80, 48).to(torch.float8_e4m3fn)
    with pytest.raises(
        NotImplementedError, match=f"steer_{op}: fp8 weights have kernels on CUDA only; quantise"
    ):
        FUNCTIONS[op](**case, scales=scales, k=8)


@pytest.mark.parametrize("weight", [*TORCH, "int8"])
@pytest.mark.parametrize("sign", ["positive", "signed"])
@pytest.mark.parametrize("gram", [True, False])
def test_elastic_net_equals_reference(weight, sign, gram):
    case = steer_case("pursuit", weight=weight, rows=(2, 5))
    options = {"coder": "elastic_net", "k_out": 6, "sign": sign, "tau": 0.9, "alpha": 0.1}
    want = reference.steer_pursuit(**case, **options)
    if gram:
        scales = as_torch(case["scales"]) if weight == "int8" else None
        matrices = as_torch(case["analysis"]), as_torch(case["atoms"])
        case["gram"] = ops.build_gram(*matrices, torch.float16, scales=scales).numpy()
    assert_steered(run("pursuit", case, **options), want, case["z"], "fp32")


MISUSE = [
    ("sae", {"enc": (80, 47)}, ValueError, r"steer_sae: enc must have shape \(m, d\) with d=48, got"),
    ("sae", {"dec": (79, 48)}, ValueError, r"steer_sae: dec must have shape \(m, d\) with m=80, d=48"),
    ("sae", {"enc_bias": (79,)}, ValueError, r"steer_sae: enc_bias must have shape \(m,\) with m=80"),
    ("sae", {"gain": (1, 80)}, ValueError, r"steer_sae: gain must have shape \(P, m\) with m=80 and P >= 2"),
    ("sae", {"boost": (4, 80)}, ValueError, r"steer_sae: boost must have shape \(P, m\) with P=5, m=80"),
    ("sae", {"shift": (5, 49)}, ValueError, r"steer_sae: shift must have shape \(P, d\) with P=5, d=48"),
    ("sae", {"limits": (5, 3)}, ValueError, r"steer_sae: limits must have shape \(P, 4\) with P=5"),
    ("pursuit", {"gram": (80, 79)}, ValueError, r"steer_pursuit: gram must have shape \(m, m\) with m=80"),
    ("pursuit", {"bias": (3,)}, ValueError, r"steer_pursuit: bias must have shape \(m,\) with m=80, got"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "change", "error", "message"), MISUSE)
def test_wrong_shapes(op, change, error, message):
    case = tensors(op)
    for name, shape in change.items():
        case[name] = torch.zeros(shape)
    with pytest.raises(error, match=message):
        FUNCTIONS[op](**case, k=8)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("z", torch.float64, "steer_sae: z must be float32, float16 or bfloat16, got float64"),
        ("slots", torch.int64, "steer_sae: slots must be int32, got int64"),
        ("dec", torch.float16, "steer_sae: dec must have dtype float32 like enc, got float16"),
        ("gain", torch.float16, "steer_sae: gain must be float32, got float16"),
        ("undesirable", torch.uint8, "steer_sae: undesirable must be bool, got uint8"),
    ],
)
def test_wrong_dtypes(name, dtype, message):
    case = tensors("sae")
    case[name] = case[name].to(dtype)
    with pytest.raises(TypeError, match=message):
        ops.steer_sae(**case, k=8)


@pytest.mark.parametrize(
    ("op", "options", "error", "message"),
    [
        ("sae", {"k": 81}, ValueError, "k must be at most the number of atoms m=80, got 81"),
        ("sae", {"k": 0}, ValueError, "k must be at least 1, got 0"),
        ("sae", {"k": 2.5}, TypeError, "k must be an int, got float"),
        ("sae", {"k_out": -1}, ValueError, "k_out must be at least 0, got -1"),
        ("sae", {"coder": "top"}, ValueError, "coder must be 'topk', 'relu', 'jumprelu' or 'none', got"),
        ("pursuit", {"k": 65}, ValueError, "k must be at most 64, got 65"),
        ("pursuit", {"sign": "plus"}, ValueError, "sign must be 'positive', 'signed' or 'nnls', got 'plus'"),
        ("pursuit", {"tol": -0.1}, ValueError, "tol must be a fraction"),
        ("pursuit", {"coder": "elastic_net", "tau": 1.5}, ValueError, "tau must be the L1 share"),
        ("pursuit", {"coder": "elastic_net", "alpha": 0.0}, ValueError, "alpha must be the strength"),
    ],
)  # fmt: skip
def test_wrong_attributes(op, options, error, message):
    with pytest.raises(error, match=f"steer_{op}: {message}"):
        FUNCTIONS[op](**tensors(op), **{"k": 8, **options})


def test_slots_must_follow_z():
    case = tensors("sae", rows=(2, 3))
    case["slots"] = case["slots"].T
    with pytest.raises(ValueError, match=r"slots must have the shape of z without its last axis, \(2, 3\)"):
        ops.steer_sae(**case, k=8)


def test_the_library_itself_refuses_too():
    """Callers of torch.ops.daco bypass the Python checks; the same mistakes must not reach a kernel."""
    args, kwargs = raw_arguments("sae")
    bad = list(args)
    bad[2] = torch.zeros(80, 47)
    with pytest.raises(RuntimeError, match=r"enc must have shape \(m, d\) with d=48, got \(80, 47\)"):
        torch.ops.daco.steer_sae(*bad, **kwargs)
    with pytest.raises(RuntimeError, match="k must be at most the number of atoms m=80, got 99"):
        torch.ops.daco.steer_sae(*args, **{**kwargs, "k": 99})
    with pytest.raises(RuntimeError, match="coder must be one of topk, relu, jumprelu, none, got 'x'"):
        torch.ops.daco.steer_sae(*args, **{**kwargs, "coder": "x"})


def test_gradients_are_refused_not_cut():
    case = tensors("sae")
    case["z"].requires_grad_()
    with pytest.raises(NotImplementedError, match="steer_sae: the operator has no derivative"):
        ops.steer_sae(**case, k=8)
    with torch.no_grad():
        assert not ops.steer_sae(**case, k=8).z.requires_grad


def test_cuda_tensors_are_refused():
    with FakeTensorMode():
        case = {k: torch.empty(v.shape, dtype=v.dtype, device="cuda") for k, v in tensors("sae").items()}
        with pytest.raises(NotImplementedError, match="this build has no CUDA kernels"):
            ops.steer_sae(**case, k=8)


def test_importing_ops_is_light():
    code = "import sys, daco_rt.ops, daco_rt.ops.numpy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
