"""The native kernels on NumPy arrays, and what the build says about itself."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from steer_cases import DTYPES, assert_steered, steer_case

import daco_rt
from daco_rt import _native
from daco_rt.errors import DacoError
from daco_rt.ops import numpy as ops
from daco_rt.ops import reference

FUNCTIONS = {"sae": ops.steer_sae, "pursuit": ops.steer_pursuit}
ISAS = ("scalar", "avx2", "avx512")


def here(isa: str) -> str:
    """The instruction set if this machine has it, else a skip."""
    if ISAS.index(isa) > ISAS.index(_native.build_info()["best_isa"]):
        pytest.skip(f"this machine has no {isa}")
    return isa


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("activation", "weight"), [("fp32", "fp32"), ("fp16", "bf16"), ("bf16", "fp16")])
def test_equals_reference(isa, activation, weight):
    for op, options in (("sae", {"coder": "topk"}), ("sae", {"coder": "jumprelu"}), ("pursuit", {})):
        case = steer_case(op, activation=activation, weight=weight, rows=(2, 5))
        options = {**options, "k": 6, "k_out": 4}
        want = getattr(reference, f"steer_{op}")(**case, **options)
        got = FUNCTIONS[op](**case, **options, isa=here(isa), threads=2)
        assert_steered(got, want, case["z"], activation)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_threads_do_not_change_the_result(op):
    case = steer_case(op, rows=(33,))
    one = FUNCTIONS[op](**case, k=8, k_out=4)
    for threads in (2, 5):
        many = FUNCTIONS[op](**case, k=8, k_out=4, threads=threads)
        for a, b in zip(one, many, strict=True):
            np.testing.assert_array_equal(a, b)


def test_one_thread_starts_none(monkeypatch):
    """Native threads are no Python threads, so the kernel is asked: /proc lists what a process runs."""
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("no /proc")
    case = steer_case("sae", rows=(400,), d=256, m=512)
    before = {p.name for p in tasks.iterdir()}
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.update(p.name for p in tasks.iterdir())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(5):
            ops.steer_sae(**case, k=8)
    finally:
        done.set()
        watcher.join()
    assert len(seen - before) <= 1  # the watcher itself


@pytest.mark.parametrize("op", FUNCTIONS)
def test_read_only_and_strided_arrays(op):
    case = steer_case(op, rows=(3, 4), activation="bf16", weight="bf16")
    want = FUNCTIONS[op](**case, k=8, k_out=2)
    strided = {name: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a for name, a in case.items()}
    frozen = {name: a.copy() for name, a in case.items()}
    for a in frozen.values():
        a.setflags(write=False)
    for variant in (strided, frozen):
        for a, b in zip(FUNCTIONS[op](**variant, k=8, k_out=2), want, strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("weight", DTYPES)
def test_build_gram(weight, dtype):
    e = steer_case("pursuit", weight=weight)["analysis"]
    a = np.roll(e, 1, axis=0)
    want = e.astype(np.float64) @ a.astype(np.float64).T
    got = ops.build_gram(e, a, dtype, threads=2)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, atol=1e-3)
    np.testing.assert_allclose(ops.build_gram(e, a, dtype, isa="scalar"), want, atol=1e-3)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_no_rows(op):
    out = FUNCTIONS[op](**steer_case(op, rows=(0,)), k=8, k_out=3)
    assert [x.shape for x in out] == [(0, 48), (0, 2), (0, 3), (0, 3)]


def test_misuse():
    case = steer_case("sae")
    with pytest.raises(ValueError, match=r"shift must have shape \(P, d\) with P=5, d=48, got \(5, 3\)"):
        ops.steer_sae(**{**case, "shift": np.zeros((5, 3), np.float32)})
    with pytest.raises(TypeError, match="steer_sae: z must be float32, float16 or bfloat16, got float64"):
        ops.steer_sae(**{**case, "z": case["z"].astype(np.float64)})
    with pytest.raises(TypeError, match="operands must be NumPy arrays, got list"):
        ops.steer_sae(**{**case, "slots": [1] * 9})
    with pytest.raises(ValueError, match="isa must be auto, scalar, avx2 or avx512, got 'neon'"):
        ops.steer_sae(**case, isa="neon")
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        ops.steer_sae(**case, threads=0)
    with pytest.raises(ValueError, match=r"scales must be None with float32 weights.* got shape \(80,\)"):
        ops.steer_sae(**case, scales=np.ones(80, np.float32))
    tiny = ml_dtypes.float8_e4m3fn
    quantised = {**case, "enc": case["enc"].astype(tiny), "dec": case["dec"].astype(tiny)}
    with pytest.raises(NotImplementedError, match="steer_sae: fp8 weights have kernels on CUDA only"):
        ops.steer_sae(**quantised, scales=np.ones((2, 80), np.float32))


def test_what_fitted_once_does_not_let_other_operands_pass():
    case = steer_case("sae", rows=(3,))
    ops.steer_sae(**case, k=4)
    for wrong in (4.0, True):
        with pytest.raises(TypeError, match=f"k must be an int, got {type(wrong).__name__}"):
            ops.steer_sae(**case, k=wrong)
    for name in case:
        with pytest.raises(TypeError, match=r"NumPy arrays|must be|must have dtype"):
            ops.steer_sae(**{**case, name: case[name].astype(np.complex64)}, k=4)
        with pytest.raises(ValueError, match="must have"):
            ops.steer_sae(**{**case, name: case[name][..., :-1]}, k=4)


def test_build_info():
    info = _native.build_info()
    assert info["version"] == daco_rt.__version__
    assert "scalar" in info["isas"] and info["best_isa"] in info["isas"]
    assert not any("/" in str(v) for v in info.values())


def test_missing_parts_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(daco_rt, "__path__", [str(tmp_path)])
    with pytest.raises(DacoError, match=r"without its onnxruntime library .*fetch_onnxruntime_headers\.sh"):
        _native.library_path("onnxruntime")
    with pytest.raises(DacoError, match="unknown library 'onnxrntime'; did you mean 'onnxruntime'"):
        _native.library_path("onnxrntime")

    def missing(name: str):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    _native.core.cache_clear()
    with pytest.raises(DacoError, match="without its extension module"):
        _native.core()
