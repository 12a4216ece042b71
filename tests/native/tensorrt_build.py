"""Builds the C++ host that stands in for TensorRT, and finds what it needs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from daco_rt._native import library_path
from daco_rt.errors import DacoError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "native-tests-tensorrt"


def plugin_library() -> Path:
    """Path of the plugin library; skips the test where it was not built."""
    try:
        return library_path("tensorrt")
    except DacoError as error:
        pytest.skip(f"the TensorRT plugin was not built here: {error}")


def build_host() -> Path:
    """Compile ``tests/native/tensorrt`` and return the folder of its programs."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", *generator, "-S", str(HERE / "tensorrt"), "-B", str(BUILD)],
        ["cmake", "--build", str(BUILD), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return BUILD
