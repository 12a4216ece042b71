"""SteerSae and SteerAffine on a GPU against the float64 reference, and the promises of a launch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from steer_cases import assert_steered, steer_case  # noqa: E402

from daco_rt import ops  # noqa: E402
from daco_rt.ops import reference  # noqa: E402

CODERS = ("topk", "relu", "jumprelu", "none")
ACTIVATIONS = ("fp32", "fp16", "bf16")


def on(device: str, case: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Operands as tensors on the device."""
    return {name: tensor(array).to(device) for name, array in case.items()}


def tensor(a: np.ndarray) -> torch.Tensor:
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.uint16).copy()).view(torch.bfloat16)
    if a.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(a.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(a.copy())


def array(x: torch.Tensor, like: np.ndarray | None = None) -> np.ndarray:
    x = x.cpu()
    return x.view(torch.uint16).numpy().view(like.dtype) if x.dtype == torch.bfloat16 else x.numpy()


def results(out: Any, z: np.ndarray) -> tuple[np.ndarray, ...]:
    return (array(out[0], z), *(array(x) for x in out[1:]))


def fp8_case(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same problem with encoder and decoder in fp8."""
    q, scale = ops.quantise(case["enc"].astype(np.float32), "fp8")
    return {**case, "enc": q, "dec": q, "scales": np.stack([scale, scale])}


def sae_case(weight: str, activation: str, **sizes: Any) -> dict[str, np.ndarray]:
    case = steer_case("sae", activation=activation, weight="fp32" if weight == "fp8" else weight, **sizes)
    return fp8_case(case) if weight == "fp8" else case


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", [*ACTIVATIONS, "int8", "fp8"])
@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("rows", [(2, 5), (1,), (70,)])
def test_equals_reference(device, coder, weight, activation, rows):
    if weight == "fp8" and device == "cpu":
        pytest.skip("the CPU has no fp8 kernels")
    case = sae_case(weight, activation, rows=rows, seed=sum(rows))
    options = {"coder": coder, "k": 8, "k_out": 4}
    want = reference.steer_sae(**case, **options)
    got = ops.steer_sae(**on(device, case), **options)
    assert_steered(results(got, case["z"]), want, case["z"], activation)


@pytest.mark.parametrize(("d", "m"), [(1, 1), (17, 33), (64, 129), (200, 1000), (1032, 300)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_awkward_sizes(device, d, m, activation):
    case = sae_case(activation, activation, rows=(11,), d=d, m=max(m, 8), seed=d)
    options = {"coder": "topk", "k": 8, "k_out": 8}
    want = reference.steer_sae(**case, **options)
    got = results(ops.steer_sae(**on(device, case), **options), case["z"])
    again = results(ops.steer_sae(**on(device, case), **options), case["z"])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, again, strict=True))
    if d > 1:  # at d = 1 all latents tie up to rounding
        np.testing.assert_allclose(got[1], want.doses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weight", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 16, 64, 300])
def test_reference_size(gpu, rows, weight):
    """N = 15,000, d = 4,096, k = 32; a row whose 32nd and 33rd code nearly tie is not compared."""
    m, d, k = 15_000, 4_096, 32
    draw = torch.Generator(gpu).manual_seed(rows)
    atoms = torch.randn(m, d, generator=draw, device=gpu)
    atoms /= atoms.norm(dim=1, keepdim=True)
    scales = None
    if weight == "bf16":
        stored = atoms.bfloat16()
        meant = stored.double()
    else:
        q, scale = ops.quantise(atoms, weight)
        stored, scales = q, torch.stack([scale, scale])
        meant = q.double() * scale.double()[:, None]
    weights = torch.rand(rows, m, generator=draw, device=gpu) * (torch.rand(rows, m, device=gpu) < 64 / m)
    z = (weights @ atoms + 0.02 * torch.randn(rows, d, device=gpu)).bfloat16()
    gain = torch.ones(3, m, device=gpu)
    gain[2, ::10] = 0
    tables = {
        "gain": gain,
        "undesirable": gain < 1,
        "shift": torch.zeros(3, d, device=gpu),
        "limits": torch.zeros(3, 4, device=gpu),
    }
    slots = torch.full((rows,), 2, dtype=torch.int32, device=gpu)
    out = ops.steer_sae(
        z, slots, stored, torch.zeros(m, device=gpu), stored, scales=scales, k=k, k_out=k, **tables
    )
    code = (z.double() @ meant.T).clamp_min(0)
    top = code.topk(k + 1, dim=1)
    clear = (top.values[:, k - 1] - top.values[:, k]) > 1e-4 * top.values[:, k - 1]
    assert clear.float().mean() > 0.8
    kept = top.indices[:, :k]
    assert torch.equal(out.support_index.sort(1).values[clear], kept.sort(1).values.int()[clear])
    amounts = (gain[2].double()[kept] - 1) * code.gather(1, kept)
    want = z.double() + torch.einsum("tk,tkd->td", amounts, meant[kept])
    error = (out.z.double() - want).abs() - 2.0**-8 * want.abs()
    assert error[clear].max() <= 1e-4 * z.double().norm(dim=1).max()


def test_rows_without_an_edit(device):
    case = sae_case("fp32", "bf16", rows=(12,))
    case["slots"][:] = [0, 1, 2, 3, 4, -1, 5, 2**31 - 1, 2, 0, 1, 2]
    z = case["z"].astype(np.float32)
    z[8, 3], z[9, 0], z[10, 1] = np.nan, np.inf, -np.inf
    z[11] = 0
    case["z"] = z.astype(case["z"].dtype)
    options = {"coder": "topk", "k": 8, "k_out": 3}
    got = results(ops.steer_sae(**on(device, case), **options), case["z"])
    for row in (0, 1, 8, 9, 10):
        assert got[0][row].tobytes() == case["z"][row].tobytes()
    for row in (5, 6, 7):
        assert np.isnan(got[0][row].astype(np.float32)).all() and np.isnan(got[1][row]).all()
    for row in (5, 6, 7, 8, 9, 10, 0):
        assert (got[2][row] == -1).all() and (got[3][row] == 0).all()
    assert np.isnan(got[1][[8, 10]]).all() and (got[1][[0, 9, 11]] == 0).all()


def test_huge_rows_stay_finite(device):
    case = sae_case("fp32", "fp32", rows=(5,))
    case["z"] = (case["z"] / np.abs(case["z"]).max() * 2e37).astype(np.float32)
    case["limits"][3, 0] = 0
    got = results(ops.steer_sae(**on(device, case), coder="topk", k=8), case["z"])
    assert all(np.isfinite(x).all() for x in got)


@pytest.mark.parametrize("k", [1, 33, 300, 1000])
def test_ties_go_to_the_lower_index(device, k):
    case = sae_case("fp32", "fp32", rows=(3,), d=16, m=1000)
    case["enc"] = np.repeat(case["enc"][:50], 20, axis=0)
    case["enc_bias"][:] = 0
    want = reference.steer_sae(**case, coder="topk", k=k, k_out=k)
    got = ops.steer_sae(**on(device, case), coder="topk", k=k, k_out=k)
    for t in np.flatnonzero(case["slots"] > 0):
        assert set(got.support_index[t].tolist()) == set(want.support_index[t].tolist())


@pytest.mark.parametrize("coder", ["topk", "relu"])
def test_a_captured_call_follows_refilled_operands(gpu, coder):
    first, second = (sae_case("bf16", "bf16", rows=(6,), seed=seed) for seed in (1, 2))
    held = on(gpu, first)
    options = {"coder": coder, "k": 8, "k_out": 4}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ops.steer_sae(**held, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.steer_sae(**held, **options)
    for case in (first, second, first):
        for name, fresh in on(gpu, case).items():
            held[name].copy_(fresh)
        for x in out:
            x.fill_(-7)
        graph.replay()
        torch.cuda.synchronize()
        want = reference.steer_sae(**case, **options)
        assert_steered(results(out, case["z"]), want, case["z"], "bf16")


def test_two_streams_at_once(gpu):
    cases = [sae_case("bf16", "bf16", rows=(64,), d=512, m=2000, seed=seed) for seed in (3, 4)]
    held = [on(gpu, case) for case in cases]
    alone = [ops.steer_sae(**h, k=8, k_out=8) for h in held]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in held]
    found: list[list[Any]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(ops.steer_sae(**held[i], k=8, k_out=8))
    torch.cuda.synchronize()
    for i, outs in enumerate(found):
        for out in outs:
            assert all(torch.equal(a, b) for a, b in zip(out, alone[i], strict=True))


def test_offsets_beyond_31_bits(gpu):
    m, d = 530_000, 4_096
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    weights = torch.zeros(m, d, dtype=torch.bfloat16, device=gpu)
    weights[-1, 5], weights[-2, 6], weights[3, 7] = 1.0, 1.0, 1.0
    z = torch.zeros(2, d, dtype=torch.bfloat16, device=gpu)
    z[:, 5], z[:, 6], z[:, 7] = 3.0, 2.0, 1.0
    gain = torch.ones(3, m, device=gpu)
    gain[2, -1] = 0
    slots = torch.full((2,), 2, dtype=torch.int32, device=gpu)
    tables = {
        "gain": gain,
        "undesirable": gain < 1,
        "shift": torch.zeros(3, d, device=gpu),
        "limits": torch.zeros(3, 4, device=gpu),
    }
    for coder in ("topk", "relu"):
        out = ops.steer_sae(
            z, slots, weights, torch.zeros(m, device=gpu), weights, coder=coder, k=3, k_out=3, **tables
        )
        want = [m - 1, m - 2, 3] if coder == "topk" else [m - 1, -1, -1]
        assert out.support_index.tolist() == [want, want]
        assert out.z[:, 5:8].float().tolist() == [[0, 2, 1], [0, 2, 1]]


def test_rows_beyond_31_bits(gpu):
    """Rows of z begin past 2^31 elements; a window of rows ends far before."""
    rows, d, m = 530_000, 4_096, 64
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    weights = torch.zeros(m, d, dtype=torch.bfloat16, device=gpu)
    weights[torch.arange(m), torch.arange(m) * 3] = 1.0
    z = torch.zeros(rows, d, dtype=torch.bfloat16, device=gpu)
    last = torch.arange(rows - 3, rows, device=gpu)
    z[last, 3], z[last, 6], z[last, 9] = 3.0, 2.0, 1.0
    gain = torch.ones(3, m, device=gpu)
    gain[2, 1] = 0
    tables = {
        "gain": gain,
        "undesirable": gain < 1,
        "shift": torch.zeros(3, d, device=gpu),
        "limits": torch.zeros(3, 4, device=gpu),
    }
    slots = torch.zeros(rows, dtype=torch.int32, device=gpu)
    slots[last] = 2
    for coder in ("topk", "relu"):
        out = ops.steer_sae(
            z, slots, weights, torch.zeros(m, device=gpu), weights, coder=coder, k=2, k_out=2, **tables
        )
        assert out.support_index[last].tolist() == [[1, 2] if coder == "topk" else [1, -1]] * 3
        assert out.z[last, :12].float().tolist() == [[0, 0, 0, 0, 0, 0, 2, 0, 0, 1, 0, 0]] * 3
        assert not out.z[:-3].any() and (out.support_index[:-3] == -1).all()


@pytest.mark.parametrize("weight", [*ACTIVATIONS, "int8", "fp8"])
@pytest.mark.parametrize("coder", ["relu", "jumprelu"])
def test_edited_latents_only_equal_the_full_evaluation(device, coder, weight):
    """Reporting every latent to policy 1 makes all of them be computed, and changes no edit by a bit."""
    if weight == "fp8" and device == "cpu":
        pytest.skip("the CPU has no fp8 kernels")
    case = sae_case(weight, "bf16", rows=(20,), d=200, m=1000)
    case["gain"][3], case["boost"][3] = 1, 0
    for table in ("gain", "undesirable"):
        case[table][2:, 50:] = 1 if table == "gain" else 0
    case["undesirable"][1] = False
    case["slots"][:] = np.resize([2, 3, 4], 20)
    edited = ops.steer_sae(**on(device, case), coder=coder, k_out=8)
    everything = case["undesirable"].copy()
    everything[1] = True
    full = ops.steer_sae(**on(device, {**case, "undesirable": everything}), coder=coder, k_out=8)
    assert torch.equal(edited.z, full.z) and torch.equal(edited.doses, full.doses)
    # The one did compute less: latents that nobody edits are in the other's support alone.
    assert edited.support_index.max() < 50 <= full.support_index.max()


@pytest.mark.parametrize("phi", ["identity", "relu", "clamp"])
@pytest.mark.parametrize("weight", ACTIVATIONS)
@pytest.mark.parametrize(("d", "rank"), [(48, 1), (1000, 7), (33, 130)])
def test_affine_equals_reference(device, phi, weight, d, rank):
    rng = np.random.default_rng(rank)
    names = {"fp32": np.float32, "fp16": np.float16}
    a = (rng.standard_normal((5, rank, d)) / np.sqrt(d)).astype(np.float32)
    b = (0.1 * rng.standard_normal((5, d, rank))).astype(np.float32)
    stored = [tensor(x).bfloat16() if weight == "bf16" else tensor(x.astype(names[weight])) for x in (a, b)]
    z = rng.standard_normal((9, d)).astype(np.float32)
    slots = np.array([0, 1, 2, 3, 4, -1, 2, 3, 4], np.int32)
    a_bias, shift = (rng.standard_normal(size).astype(np.float32) for size in ((5, rank), (5, d)))
    shift[2] = 0
    limits = np.zeros((5, 4), np.float32)
    limits[3, 1], limits[4, 2] = 0.1, 1
    options = {"phi": phi, "clamp": (-0.2, 0.4)}
    want = reference.steer_affine(
        z, slots, stored[0].double().numpy(), a_bias, stored[1].double().numpy(), shift=shift, limits=limits,
        **options,
    )  # fmt: skip
    put = [tensor(x).to(device) for x in (z, slots, a_bias, shift, limits)]
    got = ops.steer_affine(
        put[0], put[1], stored[0].to(device), put[2], stored[1].to(device), shift=put[3], limits=put[4],
        **options,
    )  # fmt: skip
    np.testing.assert_allclose(array(got.z), want.z, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(array(got.doses), want.doses, rtol=1e-4, atol=1e-5)


SAE_NAMES = (
    "z",
    "slots",
    "enc",
    "enc_bias",
    "dec",
    "threshold",
    "gain",
    "boost",
    "undesirable",
    "shift",
    "limits",
)


def test_opcheck(device):
    """Schema, shapes for tracing and dispatch of all four operators."""
    daco, empty = torch.ops.daco, torch.empty(0, device=device)
    held = on(device, sae_case("bf16", "bf16", rows=(5,)))
    operands = (*(held[name] for name in SAE_NAMES), empty)
    torch.library.opcheck(daco.steer_sae.default, operands, {"coder": "topk", "k": 8, "k_out": 2})
    held = on(device, steer_case("pursuit", activation="bf16", weight="bf16", rows=(5,)))
    gram = ops.build_gram(held["analysis"], held["atoms"], torch.float16)
    operands = (
        held["z"], held["slots"], held["analysis"], held["bias"], gram, held["atoms"],
        *(held[name] for name in SAE_NAMES[6:]), empty,
    )  # fmt: skip
    options = {"coder": "omp", "k": 8, "sign": "positive", "tol": 0.0, "tau": 0.95, "alpha": 0.05, "k_out": 2}
    torch.library.opcheck(daco.steer_pursuit.default, operands, options)
    torch.library.opcheck(
        daco.build_gram.default, (held["analysis"], held["atoms"], empty), {"dtype": torch.float16}
    )
    a, b = torch.randn(5, 3, 48, device=device), torch.randn(5, 48, 3, device=device)
    operands = (
        held["z"], held["slots"], a, torch.randn(5, 3, device=device), b, held["shift"], held["limits"]
    )  # fmt: skip
    torch.library.opcheck(daco.steer_affine.default, operands, {"phi": "relu", "low": -1.0, "high": 1.0})


def test_compile(device):
    held = on(device, sae_case("bf16", "bf16", rows=(5,)))
    compiled = torch.compile(
        lambda **x: ops.steer_sae(**x, k=8, k_out=2).z * 2, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(**held), ops.steer_sae(**held, k=8, k_out=2).z * 2)


def test_tensors_of_two_devices_are_refused(gpu):
    held = on(gpu, sae_case("fp32", "fp32"))
    with pytest.raises(ValueError, match="steer_sae: all tensors must be on one device"):
        ops.steer_sae(**{**held, "gain": held["gain"].cpu()}, k=8)


def test_strided_rows_are_read_in_place(device):
    case = sae_case("bf16", "bf16", rows=(4,), d=64)
    held = on(device, case)
    wide = torch.zeros(4, 3, 64, dtype=torch.bfloat16, device=device)
    wide[:, 2] = held["z"]
    straight = ops.steer_sae(**held, k=8, k_out=2)
    strided = ops.steer_sae(**{**held, "z": wide[:, 2]}, k=8, k_out=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, strided, strict=True))
