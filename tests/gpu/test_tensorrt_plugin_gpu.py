"""The plugin's nodes on a GPU against the float64 reference, driven by the C++ host as an engine would.

Outputs and workspace hold garbage before each run, and a captured graph is replayed and must give the same
bits. DACO_RT_SANITIZER is a command that the host runs under, such as "compute-sanitizer --tool memcheck".
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from plugin_host import build_host, plugin_library
from steer_cases import DTYPES, TOLERANCE, assert_steered, steer_case

from daco_rt.ops import affine_reference, quantise, reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

NAMES = {np.dtype(t): n for n, t in (("fp32", np.float32), ("fp16", np.float16), ("int32", np.int32),
                                     ("bool", np.bool_), ("int8", np.int8), ("bf16", ml_dtypes.bfloat16),
                                     ("fp8", ml_dtypes.float8_e4m3fn))}  # fmt: skip
ORDER = {
    "SteerSae": ("z", "slots", "enc", "enc_bias", "dec", "threshold",
                 "gain", "boost", "undesirable", "shift", "limits", "scales"),
    "SteerPursuit": ("z", "slots", "analysis", "bias", "gram", "atoms",
                     "gain", "boost", "undesirable", "shift", "limits", "scales"),
    "SteerAffine": ("z", "slots", "a", "a_bias", "b", "shift", "limits"),
}  # fmt: skip


class Outputs(NamedTuple):
    """What a node returned, in the operator's order."""

    z: np.ndarray
    doses: np.ndarray
    support_index: np.ndarray
    support_value: np.ndarray


@pytest.fixture(scope="module")
def host() -> Path:
    plugin_library()
    return build_host() / "plugin_run"


def run_node(
    host: Path, folder: Path, op: str, case: Mapping[str, np.ndarray], attributes: Mapping[str, Any]
) -> list[np.ndarray]:
    """Write a node, let the host run it, read its outputs."""
    folder.mkdir()
    given = [name for name in ORDER[op] if name in case]
    lines = [f"op {op}", f"text operands {','.join(given)}"]
    for name, value in attributes.items():
        if isinstance(value, str):
            lines.append(f"text {name} {value}")
        elif isinstance(value, int):
            lines.append(f"int {name} {value}")
        else:
            values = np.atleast_1d(value)
            lines.append(f"floats {name} {len(values)} {' '.join(map(str, values))}")
    for i, name in enumerate(given):
        array = np.ascontiguousarray(case[name])
        lines.append(f"input {NAMES[array.dtype]} {array.ndim} {' '.join(map(str, array.shape))}")
        (folder / f"{i}.in").write_bytes(array.tobytes())
    (folder / "node.txt").write_text("\n".join(lines) + "\n")
    command = [*shlex.split(os.environ.get("DACO_RT_SANITIZER", "")), str(host), str(plugin_library())]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    z = case["z"]
    k_out = int(attributes.get("k_out", 0))
    found = [np.frombuffer((folder / "0.out").read_bytes(), z.dtype).reshape(z.shape)]
    found.append(np.frombuffer((folder / "1.out").read_bytes(), np.float32).reshape(*z.shape[:-1], 2))
    for name, kind in (("2.out", np.int32), ("3.out", np.float32)):
        if (folder / name).exists():
            found.append(np.frombuffer((folder / name).read_bytes(), kind).reshape(*z.shape[:-1], k_out))
    return found


SHAPES = {"a token": (1, 1), "a batch": (7, 1), "a prompt": (2, 90)}
PURSUIT = {"sign": "positive", "tol": 0.0, "tau": 0.95, "alpha": 0.05}


@pytest.mark.parametrize("rows", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("activation", "weight"), [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"),
                                                    ("bf16", "fp32")])  # fmt: skip
@pytest.mark.parametrize("coder", ["topk", "relu", "jumprelu", "none"])
def test_sae_equals_the_reference(host: Path, tmp_path: Path, rows, activation, weight, coder):
    case = steer_case("sae", activation=activation, weight=weight, rows=rows, d=256, m=400)
    attributes = {"coder": coder, "k": 6, "k_out": 4}
    got = run_node(host, tmp_path / "node", "SteerSae", case, attributes)
    want = reference.steer_sae(**case, **attributes)
    assert_steered(Outputs(*got), want, case["z"], activation)


@pytest.mark.parametrize("rows", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gram", [None, "fp32", "fp16"])
@pytest.mark.parametrize(("activation", "weight"), [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16")])
def test_pursuit_equals_the_reference(host: Path, tmp_path: Path, rows, activation, weight, gram):
    case = steer_case("pursuit", activation=activation, weight=weight, rows=rows, d=256, m=400)
    if gram is not None:
        case["gram"] = gram_of(case, gram)
    attributes = {"coder": "omp", "k": 6, "k_out": 4, **PURSUIT}
    got = run_node(host, tmp_path / "node", "SteerPursuit", case, attributes)
    # A rounded Gram matrix serves selection; codes are fitted to the atoms themselves.
    exact = {name: operand for name, operand in case.items() if name != "gram"}
    want = reference.steer_pursuit(**exact, **attributes)
    assert_steered(Outputs(*got), want, case["z"], activation)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_weights(host: Path, tmp_path: Path, kind):
    case = steer_case("sae", activation="fp16", rows=(4, 3), d=256, m=400)
    enc, scale = quantise(case["enc"], dtype=kind)
    case |= {
        "enc": np.asarray(enc),
        "dec": np.asarray(enc),
        "scales": np.stack([scale, scale]).astype(np.float32),
    }
    attributes = {"coder": "topk", "k": 6, "k_out": 4}
    got = run_node(host, tmp_path / "node", "SteerSae", case, attributes)
    assert_steered(Outputs(*got), reference.steer_sae(**case, **attributes), case["z"], "fp16")


def gram_of(case: Mapping[str, np.ndarray], gram: str) -> np.ndarray:
    wide = case["analysis"].astype(np.float64)
    return (wide @ case["atoms"].astype(np.float64).T).astype(DTYPES[gram])


def assert_z(z: np.ndarray, want: np.ndarray, given: np.ndarray, tolerance: float) -> None:
    norm = np.linalg.norm(given.astype(np.float64), axis=-1, keepdims=True)
    error = np.abs(z.astype(np.float64) - want) / norm
    assert error.max() <= tolerance


@pytest.mark.parametrize("gram", ["fp32", "fp16"])
@pytest.mark.parametrize("activation", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", SHAPES.values(), ids=SHAPES)
def test_elastic_net_reaches_the_optimum(host: Path, tmp_path: Path, rows, activation, gram):
    case = steer_case("pursuit", activation=activation, rows=rows, d=64, m=120)
    case["gram"] = gram_of(case, gram)
    attributes = {"coder": "elastic_net", "k": 1, "k_out": 4, **PURSUIT, "tau": 0.9, "alpha": 0.1}
    z, *_ = run_node(host, tmp_path / "node", "SteerPursuit", case, attributes)
    exact = {name: operand for name, operand in case.items() if name != "gram"}
    # A second round corrects for an fp16 Gram matrix; what is left is of second order.
    tolerance = TOLERANCE[activation] * 2 if gram == "fp32" else TOLERANCE[activation] + 2e-4
    assert_z(z, reference.steer_pursuit(**exact, **attributes).z, case["z"], tolerance)


def affine_case(activation: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    d, r, policies = 256, 4, 4
    case = {
        "z": draw.normal(size=(3, 5, d)).astype(DTYPES[activation]),
        "slots": np.resize(np.arange(policies, dtype=np.int32), 15).reshape(3, 5),
        "a": (draw.normal(size=(policies, r, d)) / np.sqrt(d)).astype(np.float32),
        "a_bias": draw.normal(size=(policies, r)).astype(np.float32),
        "b": (draw.normal(size=(policies, d, r)) / np.sqrt(d)).astype(np.float32),
        "shift": (0.1 * draw.normal(size=(policies, d))).astype(np.float32),
        "limits": np.zeros((policies, 4), np.float32),
    }
    case["limits"][3] = 0.0, 0.2, 1.0, 0.0
    return case


@pytest.mark.parametrize("phi", ["identity", "relu", "clamp"])
@pytest.mark.parametrize("activation", ["fp32", "fp16", "bf16"])
def test_affine_equals_the_reference(host: Path, tmp_path: Path, activation, phi):
    case, clamp = affine_case(activation), (-0.5, 0.5)
    z, doses = run_node(host, tmp_path / "node", "SteerAffine", case, {"phi": phi, "clamp": clamp})
    want = affine_reference.steer_affine(**case, phi=phi, clamp=clamp)
    assert_z(z, want.z, case["z"], TOLERANCE[activation])
    np.testing.assert_allclose(doses, want.doses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", ["topk bf16", "relu fp16", "omp fp16", "omp none", "elastic_net fp16",
                                     "affine bf16"])  # fmt: skip
def test_small_nodes(host: Path, tmp_path: Path, kernels: str):
    """Every kernel once, small and with rows off every tile: for a sanitizer, which is slow."""
    coder, kind = kernels.split()
    if coder == "affine":
        case, attributes = affine_case(kind), {"phi": "clamp", "clamp": (-0.5, 0.5)}
        z, *_ = run_node(host, tmp_path / "node", "SteerAffine", case, attributes)
        want = affine_reference.steer_affine(**case, **attributes).z
        assert_z(z, want, case["z"], TOLERANCE[kind])
        return
    op = "sae" if coder in ("topk", "relu") else "pursuit"
    activation = kind if op == "sae" else "bf16"
    case = steer_case(op, activation=activation, weight=activation, rows=(3, 1), d=72, m=131)
    attributes = {"coder": coder, "k": 5, "k_out": 4, **(PURSUIT if op == "pursuit" else {})}
    given = {**case, "gram": gram_of(case, kind)} if op == "pursuit" and kind != "none" else case
    z, *_ = run_node(host, tmp_path / "node", f"Steer{op.capitalize()}", given, attributes)
    want = getattr(reference, f"steer_{op}")(**case, **attributes).z
    assert_z(z, want, case["z"], TOLERANCE[activation] + 2e-4)


def test_the_host_drives_every_creator_on_the_gpu(host: Path):
    program = host.with_name("plugin_test")
    done = subprocess.run([str(program), str(plugin_library())], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "on a GPU" in done.stdout, done.stdout + done.stderr
