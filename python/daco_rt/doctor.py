"""``daco-rt doctor``: what is installed, built and usable on this machine, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from daco_rt import __version__
from daco_rt.errors import DacoError

State = Literal["ok", "absent", "broken"]


class Finding(NamedTuple):
    """One part: whether it works, and how it is or what to do."""

    part: str
    state: State
    detail: str


def examine() -> list[Finding]:
    """Try every part for real: load each library, run one row through each operator form.

    Returns findings in the order in which a call passes the parts. ``absent`` parts are optional ones that
    were not built or installed; ``broken`` ones are there and do not work.

    Example
    -------
    >>> {finding.part: finding.state for finding in examine()}["daco-rt"]
    'ok'
    """
    findings = [
        Finding("daco-rt", "ok", f"{__version__}, Python {platform.python_version()}, {platform.machine()}")
    ]
    findings += [_package(name) for name in ("numpy", "onnxruntime", "onnxscript", "transformers", "torch")]
    for part, check in (
        ("CPU kernels", _kernels),
        ("torch ops", _torch),
        ("ONNX Runtime library", _onnxruntime),
        ("ONNX functions", _functions),
        ("TensorRT plugin", _plugin),
        ("TensorRT", _tensorrt),
        ("built-in models", _models),
    ):
        findings.append(_try(part, check))
    return findings


def _package(name: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, "broken", f"not installed: pip install {name}")
    return Finding(name, "ok", importlib.metadata.version(name))


def _try(part: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(part, "ok", check())
    except DacoError as error:
        return Finding(part, "absent", str(error))
    except Exception as error:  # whatever a library does when it is broken belongs in the report
        return Finding(part, "broken", f"{type(error).__name__}: {error}")


def _kernels() -> str:
    from daco_rt._native import build_info

    info = build_info()
    return (
        f"{info['best_isa']} (built: {', '.join(info['isas'])}), commit {info['commit']}, {info['compiler']}"
    )


def _row() -> dict[str, Any]:
    import numpy as np

    eye = np.eye(4, dtype=np.float32)
    gain = np.ones((3, 4), np.float32)
    gain[2, 0] = 0
    return {
        "z": np.array([[[3, 1, 0, 0]]], np.float32),
        "slots": np.full((1, 1), 2, np.int32),
        "enc": eye,
        "enc_bias": np.zeros(4, np.float32),
        "dec": eye,
        "gain": gain,
        "undesirable": gain == 0,
        "shift": np.zeros((3, 4), np.float32),
        "limits": np.zeros((3, 4), np.float32),
    }


def _torch() -> str:
    import torch

    from daco_rt.ops import steer_sae

    row: dict[str, Any] = {name: torch.from_numpy(value) for name, value in _row().items()}
    edited: Any = steer_sae(**row, coder="topk", k=2).z
    return _judge(edited.numpy(), "torch.ops.daco loaded and run")


def _onnxruntime() -> str:
    from daco_rt._native import library_path

    return _judge(_run_graph(library=True), str(library_path("onnxruntime")))


def _functions() -> str:
    return _judge(_run_graph(library=False), "portable form run without the library")


def _plugin() -> str:
    """Load the plugin library as TensorRT would, and ask it for what it makes."""
    import ctypes

    from daco_rt._native import build_info, library_path

    path = library_path("tensorrt")
    count = ctypes.c_int32(0)
    creators = ctypes.CDLL(str(path)).getCreators
    creators.restype = ctypes.c_void_p
    if not creators(ctypes.byref(count)) or count.value != 3:
        raise RuntimeError(f"{path} offers {count.value} plugins where 3 were expected; reinstall daco-rt")
    return f"{path}, on the headers of TensorRT {build_info()['tensorrt_headers']}"


def _tensorrt() -> str:
    spec = importlib.util.find_spec("tensorrt")
    # A mere folder of that name on the path has a spec too, without an origin.
    if spec is None or spec.origin is None:
        raise DacoError(
            "not installed; only needed, with a GPU, to build and run engines (export --runtime tensorrt)"
        )
    import tensorrt

    return f"{tensorrt.__version__}: bundles exported with --runtime tensorrt can be built and run here"


def _run_graph(library: bool):
    """One SteerSae node over the row of ``_row``, by the library's kernel or by the model-local function."""
    import onnx
    import onnx_ir as ir
    import onnxruntime
    from onnx import helper, numpy_helper

    from daco_rt._native import library_path
    from daco_rt.ops.onnx_functions import steer_function

    row = _row()
    z, slots = row.pop("z"), row.pop("slots")
    names = ("z", "slots", "enc", "enc_bias", "dec", "", "gain", "", "undesirable", "shift", "limits")
    node = helper.make_node(
        "SteerSae", names, ["out", "doses", "index", "value"], domain="ai.daco", coder="topk", k=2, k_out=0
    )
    graph = helper.make_graph(
        [node],
        "doctor",
        [
            helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, list(z.shape)),
            helper.make_tensor_value_info("slots", onnx.TensorProto.INT32, list(slots.shape)),
        ],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in row.items()],
    )
    body = ir.to_proto(steer_function("SteerSae", coder="topk", k=2, k_out=0))
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("ai.daco", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[body], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library_path("onnxruntime")))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(["out"], {"z": z, "slots": slots})[0]


def _judge(out, detail: str) -> str:
    if abs(out.reshape(-1) - [0, 1, 0, 0]).max() > 1e-6:
        raise RuntimeError(f"a row that should become [0 1 0 0] became {out.reshape(-1)}; reinstall daco-rt")
    return detail


def _models() -> str:
    from daco_rt.models.catalogue import models_available

    return "; ".join(f"{model.name}: {model.state}" for model in models_available())
