"""SteerPursuit on a GPU: against the float64 reference, against itself in every arrangement, in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from steer_cases import TOLERANCE, assert_steered, steer_case

torch = pytest.importorskip("torch")

from daco_rt.ops import reference  # noqa: E402

CLUSTER = "DACO_RT_CUDA_CLUSTER"
CLUSTERS = (1, 2, 4, 8, 16)


PLACE = {"device": "cuda"}


@pytest.fixture(autouse=True)
def place(device: str) -> None:
    PLACE["device"] = device


@pytest.fixture(autouse=True)
def any_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(CLUSTER, raising=False)
    yield


def tensor(x: Any) -> Any:
    """A NumPy array, bf16 included, where the tests run."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).to(PLACE["device"]).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(x)).to(PLACE["device"])


def array(x: Any) -> np.ndarray:
    import ml_dtypes

    x = x.cpu()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def steer(case: dict[str, Any], gram: Any = None, **how: Any) -> Any:
    from daco_rt import ops

    operands = {name: tensor(x) for name, x in case.items() if name != "gram"}
    return ops.steer_pursuit(**operands, gram=gram, **how)


def gram_of(case: dict[str, Any], dtype: Any) -> Any:
    from daco_rt import ops

    return ops.build_gram(tensor(case["analysis"]), tensor(case["atoms"]), dtype)


def expected(case: dict[str, Any], **how: Any) -> Any:
    return reference.steer_pursuit(**case, **how)


def same_bits(left: Any, right: Any) -> bool:
    def bits(x: Any) -> Any:
        x = x.contiguous()
        return x.view(torch.int32 if x.element_size() == 4 else torch.int16)

    return all(torch.equal(bits(a), bits(b)) for a, b in zip(left, right, strict=True))


def coherent(rows: int, m: int = 3000, d: int = 512, seed: int = 0) -> dict[str, Any]:
    """Atoms that share directions, and rows that are mixtures of 32 of them, in bf16."""
    case = steer_case("pursuit", activation="bf16", weight="bf16", rows=(rows,), d=d, m=m, seed=seed)
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((8, d))
    atoms = rng.standard_normal((m, d)) + 0.25 * rng.standard_normal((m, 8)) @ shared
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    atoms = atoms.astype(case["atoms"].dtype)
    z = np.stack(
        [rng.lognormal(0, 0.5, 32) @ atoms[rng.choice(m, 32)].astype(np.float64) for _ in range(rows)]
    )
    z += 0.1 * np.abs(z).mean() * rng.standard_normal(z.shape)
    case |= {"analysis": atoms, "atoms": atoms, "z": z.astype(case["z"].dtype)}
    case["slots"][:] = 2
    return case


@pytest.mark.parametrize("weight", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("activation", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("gram", ["fp32", "none"])
def test_omp_is_the_reference(activation: str, weight: str, gram: str):
    case = steer_case("pursuit", activation=activation, weight=weight, rows=(9,))
    given = gram_of(case, torch.float32) if gram == "fp32" else None
    got = steer(case, given, k=6, k_out=8)
    assert_steered([array(x) for x in got], expected(case, k=6, k_out=8), case["z"], activation)


@pytest.mark.parametrize("sign", ["positive", "signed"])
@pytest.mark.parametrize("tol", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(1, 48, 80), (5, 33, 61), (70, 130, 257)])
def test_omp_of_odd_sizes_and_options(sign: str, tol: float, shape: tuple[int, int, int]):
    rows, d, m = shape
    case = steer_case("pursuit", rows=(rows,), d=d, m=m, seed=rows)
    got = steer(case, gram_of(case, torch.float32), k=7, k_out=7, sign=sign, tol=tol)
    want = expected(case, k=7, k_out=7, sign=sign, tol=tol)
    assert_steered([array(x) for x in got], want, case["z"], "fp32")


@pytest.mark.parametrize("rows", [1, 9, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_cluster_gives_the_same_bits(rows: int, dtype: Any, monkeypatch: pytest.MonkeyPatch):
    case = coherent(rows)
    gram = gram_of(case, dtype)
    chosen = steer(case, gram, k=32, k_out=32)
    assert same_bits(chosen, steer(case, gram, k=32, k_out=32))
    for cluster in CLUSTERS:
        monkeypatch.setenv(CLUSTER, str(cluster))
        assert same_bits(chosen, steer(case, gram, k=32, k_out=32)), cluster


@pytest.mark.parametrize("rows", [3, 260])
@pytest.mark.parametrize("gram", ["fp16", "fp32", "none"])
def test_pursuit_explains_as_much_as_float64(rows: int, gram: str):
    case = coherent(rows, seed=3)
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(gram)
    # With both signs no chosen atom is left out of the report.
    how = {"k": 32, "k_out": 32, "sign": "signed"}
    got = steer(case, None if dtype is None else gram_of(case, dtype), **how)
    index, value = array(got.support_index), array(got.support_value)
    atoms = case["atoms"].astype(np.float64)
    few = {**case, "z": case["z"][:3], "slots": case["slots"][:3]}
    want = expected(few, **how)
    for t, row in enumerate(few["z"].astype(np.float64)):
        kept = index[t] >= 0
        left = np.linalg.norm(row - value[t][kept].astype(np.float64) @ atoms[index[t][kept]])
        best = np.linalg.norm(row - want.support_value[t] @ atoms[want.support_index[t]])
        assert left <= 1.001 * best
        # Codes are the least squares of the chosen atoms, whatever chose them.
        exact = np.linalg.lstsq(atoms[index[t][kept]].T, row, rcond=None)[0]
        assert np.abs(value[t][kept] - exact).max() <= 1e-3 * np.abs(exact).max()


def test_duplicates_and_atoms_without_length_are_left_out():
    case = steer_case("pursuit", rows=(6,), m=60)
    case["atoms"][1::2] = case["atoms"][::2]
    case["atoms"][4] = 0
    case["analysis"] = case["atoms"]
    for dtype in (torch.float32, torch.float16):
        got = steer(case, gram_of(case, dtype), k=12, k_out=12)
        index = array(got.support_index)
        for row in index:
            chosen = row[row >= 0] // 2
            assert len(set(chosen)) == len(chosen) and 4 not in row


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_quantised_weights(quantised: str, device: str):
    from daco_rt import ops

    if quantised == "fp8" and device == "cpu":
        pytest.skip("the CPU has no fp8 kernels")

    case = steer_case("pursuit", activation="bf16", rows=(9,))
    atoms = tensor(case["atoms"])
    q, scale = ops.quantise(atoms, quantised)
    exact = (q.float() * scale[:, None]).cpu().numpy()
    operands = {name: tensor(x) for name, x in case.items()} | {"analysis": q, "atoms": q}
    scales = torch.stack((scale, scale))
    got = ops.steer_pursuit(**operands, scales=scales, k=5, k_out=5)
    want = expected({**case, "analysis": exact, "atoms": exact}, k=5, k_out=5)
    assert_steered([array(x) for x in got], want, case["z"], "bf16")


@pytest.mark.parametrize("sign", ["positive", "signed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_elastic_net_reaches_the_optimum(sign: str, dtype: Any, rows: int):
    case = steer_case("pursuit", rows=(rows,), d=64, m=120)
    how = {"coder": "elastic_net", "tau": 0.9, "alpha": 0.1, "sign": sign, "k_out": 40}
    got = steer(case, gram_of(case, dtype), **how)
    want = expected(case, **how)
    z = case["z"].astype(np.float64)
    error = np.abs(array(got.z) - want.z) / np.linalg.norm(z, axis=-1, keepdims=True)
    # A second round corrects for an fp16 Gram matrix; what is left is of second order.
    assert np.nanmax(error) <= (2e-4 if dtype == torch.float16 else TOLERANCE["fp32"] * 2)


def test_broken_rows_are_copied_or_marked():
    case = steer_case("pursuit", rows=(6,))
    case["slots"][:] = 0, 2, 2, -1, 9, 2
    case["z"][1, 3] = np.inf
    case["z"][2] = 0
    got = steer(case, gram_of(case, torch.float16), k=4, k_out=4)
    z, doses = array(got.z), array(got.doses)
    assert (z[:2].view(np.int32) == case["z"][:2].view(np.int32)).all() and (z[2] == 0).all()
    assert np.isnan(z[3:5]).all() and np.isfinite(z[5]).all()
    assert (
        (doses[0] == 0).all()
        and np.isnan(doses[1]).all()
        and (doses[2] == 0).all()
        and np.isnan(doses[3:5]).all()
    )


TABLES = ("gain", "boost", "undesirable", "shift", "limits")


@pytest.mark.parametrize("rows", [2, 300])
@pytest.mark.parametrize("coder", ["omp fp16", "omp none", "elastic_net fp16"])
def test_a_graph_follows_what_is_refilled(rows: int, coder: str, gpu: str):
    from daco_rt import ops

    coder, gram = coder.split()
    case = coherent(rows, m=1000, d=256)
    operands = {name: tensor(x) for name, x in case.items()}
    given = gram_of(case, torch.float16) if gram == "fp16" else None

    def call() -> Any:
        return ops.steer_pursuit(**operands, gram=given, coder=coder, k=8, k_out=8)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    before = None
    for slot, seed in ((2, 5), (3, 6), (4, 6), (0, 7)):
        fresh = coherent(rows, m=1000, d=256, seed=seed)
        operands["slots"].fill_(slot)
        # Policies are changed under the graph as a host changes them: in place, none of them moved.
        for name in ("z", *TABLES):
            operands[name].copy_(tensor(fresh[name]))
        for x in captured:
            x.fill_(-7)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(captured, call())
        if slot == 0:
            assert torch.equal(captured[0], operands["z"])
        elif before is not None:
            assert not torch.equal(captured[0], before)
        before = captured[0].clone()


@pytest.mark.parametrize("coder", ["omp fp16", "omp none", "elastic_net fp16"])
def test_two_streams_at_once(coder: str, gpu: str):
    from daco_rt import ops

    coder, gram = coder.split()
    cases = [coherent(40, m=1000, d=256, seed=seed) for seed in (3, 4)]
    grams = [gram_of(case, torch.float16) if gram == "fp16" else None for case in cases]
    held = [{name: tensor(x) for name, x in case.items()} for case in cases]

    def call(i: int) -> Any:
        return ops.steer_pursuit(**held[i], gram=grams[i], coder=coder, k=16, k_out=16)

    alone = [call(i) for i in range(2)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in held]
    found: list[list[Any]] = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(call(i))
    torch.cuda.synchronize()
    for i, outs in enumerate(found):
        assert all(same_bits(out, alone[i]) for out in outs)


def test_a_gram_matrix_beyond_31_bits(gpu: str):
    """The atoms that are chosen lie where their rows of the Gram matrix begin past 2^31 entries."""
    from daco_rt import ops

    m, d = 50_000, 64
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB of free GPU memory")
    atoms = torch.zeros(m, d, device=gpu)
    atoms[:, d - 1] = 0.5
    atoms[-1, 3], atoms[-2, 5], atoms[7, 9] = 4.0, 3.0, 2.0
    gram = ops.build_gram(atoms, atoms, torch.float16)
    assert gram[-1, -1].item() == 16.25 and gram[-1, -2].item() == 0.25 and gram[-2, 0].item() == 0.25
    z = torch.zeros(2, d, device=gpu)
    z[:, 3], z[:, 5] = 8.0, 3.0
    tables = {
        "gain": torch.ones(3, m, device=gpu),
        "undesirable": torch.zeros(3, m, dtype=torch.bool, device=gpu),
        "shift": torch.zeros(3, d, device=gpu),
        "limits": torch.zeros(3, 4, device=gpu),
    }
    tables["gain"][2, -1] = 0
    out = ops.steer_pursuit(
        z, torch.full((2,), 2, dtype=torch.int32, device=gpu), atoms, torch.zeros(m, device=gpu), atoms,
        gram=gram, k=2, k_out=2, **tables,
    )  # fmt: skip
    assert [sorted(row) for row in out.support_index.tolist()] == [[m - 2, m - 1]] * 2
    chosen = atoms[[m - 1, m - 2]].double().cpu().numpy()
    codes = np.linalg.lstsq(chosen.T, z[0].double().cpu().numpy(), rcond=None)[0]
    want = z[0].double().cpu().numpy() - codes[0] * chosen[0]
    assert np.abs(array(out.z) - want).max() <= 1e-4


@pytest.mark.parametrize("weight", ["fp32", "bf16"])
def test_build_gram_is_the_product(weight: str):
    case = steer_case("pursuit", weight=weight, m=203, d=77)
    exact = case["analysis"].astype(np.float64) @ case["atoms"].astype(np.float64).T
    assert np.abs(array(gram_of(case, torch.float32)) - exact).max() < 1e-5
    assert np.abs(array(gram_of(case, torch.float16)).astype(np.float64) - exact).max() < 1e-3


def test_nnls_is_refused_with_a_sentence(gpu: str):
    case = steer_case("pursuit")
    with pytest.raises((NotImplementedError, RuntimeError), match="nnls"):
        steer(case, k=4, sign="nnls")
