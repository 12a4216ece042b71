"""Exported graphs in TensorRT-RTX, which parses ONNX and builds engines on a CPU: our builder, its module.

It takes no plugins, so it inlines the function behind each steering node. That shows that both graphs are in
the dialect, and that profiles, caches and types fit, for every precision.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin_host import plugin_library, run_beside

from daco_rt.export import export_model

PROGRAM = """
import sys
import tensorrt_rtx_bindings as trt
from daco_rt.artifacts.bundle import load_bundle
from daco_rt.artifacts.engine import TensorRTPlan
from daco_rt.errors import DacoError
from daco_rt.export.tensorrt.build import build_engine
from daco_rt.export.tensorrt.profiles import decoder_profiles, vision_profiles

bundle = load_bundle(sys.argv[1])
plan = TensorRTPlan.of(bundle)
decoder = build_engine(trt, bundle.decoder_path, lambda inputs: decoder_profiles(inputs, plan))
print("decoder", decoder.layers, decoder.plan.nbytes)
vision = build_engine(trt, bundle.vision_path, lambda inputs: vision_profiles(inputs, plan))
print("vision", vision.layers, vision.plan.nbytes)
try:
    build_engine(trt, bundle.decoder_path, lambda inputs: decoder_profiles(inputs, plan), plugins=2)
except DacoError as error:
    print("refused", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_both_graphs_build(tmp_path: Path, precision: str):
    plugin_library()
    path = tmp_path / "bundle"
    export_model(
        "internvl", checkpoint="pocket-internvl", output=path, runtime="tensorrt", precision=precision,
        max_length=64, max_batch=2, layers=(2, 3),
    )  # fmt: skip
    done = run_beside("tensorrt_rtx_bindings", PROGRAM, path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line)
    for graph in ("decoder", "vision"):
        layers, size = map(int, lines[graph].split())
        assert layers > 100 and size > 1_000_000
    assert "TensorRT made 0 plugin layer(s) where 2 blocks are steered" in lines["refused"]
