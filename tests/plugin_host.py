"""The C++ host that stands in for TensorRT (``tests/native/plugin``), and NVIDIA's own libraries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from daco_rt._native import library_path
from daco_rt.errors import DacoError

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "native-tests-plugin"
WHEELS = ROOT / "build" / "deps" / "tensorrt-wheels"
"""Where ``make test-tensorrt`` puts NVIDIA's own libraries."""


def plugin_library() -> Path:
    """Path of the plugin library; skips the test where it was not built."""
    try:
        return library_path("tensorrt")
    except DacoError as error:
        pytest.skip(f"the TensorRT plugin was not built here: {error}")


def build_host() -> Path:
    """Compile the host and return the folder of its programs."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", *generator, "-S", str(ROOT / "tests" / "native" / "plugin"), "-B", str(BUILD)],
        ["cmake", "--build", str(BUILD), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return BUILD


def run_beside(module: str, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a Python program with one of NVIDIA's modules at hand, in a process of its own: their libraries
    end the process where others raise. Skips the test where the module is not there."""
    path = os.pathsep.join([str(WHEELS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    there = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if there.returncode != 0:
        pytest.skip(f"{module} is not installed: make test-tensorrt fetches it")
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
