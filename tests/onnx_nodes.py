"""ONNX models of one steering node, and sessions that run them through the custom-op library."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from daco_rt import _native
from daco_rt.ops import reference

DOMAIN = "ai.daco"
ELEMENT = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}
POLICIES = ("gain", "boost", "undesirable", "shift", "limits", "scales")
INPUTS = {
    "sae": ("z", "slots", "enc", "enc_bias", "dec", "threshold", *POLICIES),
    "pursuit": ("z", "slots", "analysis", "bias", "gram", "atoms", *POLICIES),
}
ATTRIBUTES = {
    "sae": {"coder": "topk", "k": 6, "k_out": 4},
    "pursuit": {
        "coder": "omp", "k": 6, "sign": "positive", "tol": 0.0, "tau": 0.95, "alpha": 0.05, "k_out": 4,
    },
}  # fmt: skip
OUTPUTS = ("new_z", "doses", "support_index", "support_value")


def make_model(
    op: str, case: dict, *, outputs=OUTPUTS, fed=("z", "slots"), rank=3, functions=(), **attributes
):
    """One steering node; operands in `fed` are graph inputs, the others initialisers, absent ones ""."""
    attributes = {**ATTRIBUTES[op], "plugin_namespace": DOMAIN, "plugin_version": "1", **attributes}
    names = [name if name in case else "" for name in INPUTS[op]]
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        f"Steer{op.capitalize()}",
        names,
        outputs,
        domain=DOMAIN,
        name="steer",
        **{k: v for k, v in attributes.items() if v is not None},
    )
    dims = ["B", "S"][2 - rank + 1 :]

    def info(name: str):
        shape = [*dims, case["z"].shape[-1]] if name == "z" else dims if name == "slots" else case[name].shape
        return helper.make_tensor_value_info(name, ELEMENT[case[name].dtype.name], shape)

    graph = helper.make_graph(
        [node],
        "steered",
        [info(name) for name in case if name in fed],
        # Types and shapes of the results are left to the library's inference.
        [onnx.ValueInfoProto(name=name) for name in outputs if name],
        [
            helper.make_tensor(name, ELEMENT[a.dtype.name], a.shape, a.tobytes(), raw=True)
            for name, a in case.items()
            if name not in fed
        ],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, ir_version=11, opset_imports=opsets, functions=list(functions))


def session(
    model: onnx.ModelProto, threads: int = 2, library: bool = True, provider: str = "CPUExecutionProvider"
) -> ort.InferenceSession:
    """A session in which every node must be the provider's own."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if library:
        options.register_custom_ops_library(str(_native.library_path("onnxruntime")))
    return ort.InferenceSession(model.SerializeToString(), options, providers=[provider])


def run(s: ort.InferenceSession, case: dict) -> list[np.ndarray]:
    """Run with bf16 in and out, for which NumPy feeds have no type."""
    binding = s.io_binding()
    held = []
    for wanted in s.get_inputs():
        a = np.ascontiguousarray(case[wanted.name])
        bits = a.view(np.uint16) if a.dtype.name == "bfloat16" else a
        held.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ELEMENT[a.dtype.name]))
        binding.bind_ortvalue_input(wanted.name, held[-1])
    shapes = {"new_z": (case["z"].shape, case["z"].dtype)}
    results = []
    for out in s.get_outputs():
        if out.type == "tensor(bfloat16)":
            shape, dtype = shapes[out.name]
            bits = np.empty(shape, np.uint16)
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
            binding.bind_ortvalue_output(out.name, value)
            results.append((value, bits.view(dtype)))
        else:
            binding.bind_output(out.name)
            results.append(None)
    s.run_with_iobinding(binding)
    values = binding.get_outputs()
    return [v.numpy() if r is None else r[1] for v, r in zip(values, results, strict=True)]


def expected(op: str, case: dict, **attributes):
    options = {**ATTRIBUTES[op], **attributes}
    return getattr(reference, f"steer_{op}")(**case, **options)
