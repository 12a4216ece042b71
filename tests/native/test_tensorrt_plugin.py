"""The TensorRT plugin without TensorRT, and in the plugin registry of TensorRT's lean runtime."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from plugin_host import build_host, plugin_library, run_beside

LEAN = """
import sys
import numpy as np
import tensorrt_lean_bindings as trt

class Logger(trt.ILogger):
    def log(self, severity, message):
        pass

runtime = trt.Runtime(Logger())
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
kinds = trt.PluginFieldType

def field(name, value):
    if isinstance(value, str):
        return trt.PluginField(name, np.frombuffer(value.encode(), np.int8), kinds.CHAR)
    integer = isinstance(value, int)
    data = np.array([value], np.int32 if integer else np.float32)
    return trt.PluginField(name, data, kinds.INT32 if integer else kinds.FLOAT32)

def make(op, **values):
    creator = registry.get_creator(op, "1", "ai.daco")
    assert creator is not None, op
    fields = [field(name, value) for name, value in values.items()]
    return creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.RUNTIME)

pursuit = dict(coder="omp", sign="positive", k=16, k_out=8, tol=0.0, tau=0.95, alpha=0.05)
made = [make("SteerSae", coder="topk", k=32, k_out=4), make("SteerPursuit", **pursuit),
        make("SteerAffine", phi="relu")]
assert all(plugin is not None for plugin in made)
try:
    refused = make("SteerSae", coder="nope", k=32, k_out=4)
except Exception:
    refused = None
assert refused is None
print("created in", trt.__version__)
"""


@pytest.fixture(scope="module")
def library() -> Path:
    return plugin_library()


def test_the_host_drives_every_creator(library: Path):
    done = subprocess.run(
        [str(build_host() / "plugin_test"), str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok") >= 10 and "FAILED" not in done.stdout


def test_it_needs_nothing_of_tensorrt_or_cuda(library: Path):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    needed = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout.lower()
    for name in ("nvinfer", "cudart", "libcuda", "cublas"):
        assert name not in needed, f"the plugin names {name} as a library it needs"
    names = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", str(library)], capture_output=True, text=True, check=True
    ).stdout
    own = {
        line.split()[-1]
        for line in names.splitlines()
        if " FUNC " in line and " GLOBAL " in line and " UND " not in line
    }
    assert own == {"getCreators", "setLoggerFinder"}, own


def test_the_lean_runtime_creates_every_plugin(library: Path):
    done = run_beside("tensorrt_lean_bindings", LEAN, library)
    assert done.returncode == 0 and "created in" in done.stdout, done.stdout + done.stderr
