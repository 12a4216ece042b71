"""Builds and runs the C++ tests of this folder: contracts, primitives, and whole calls on fenced memory."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "native-tests"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cpp():
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", *generator, "-S", str(HERE), "-B", str(BUILD)],
        ["cmake", "--build", str(BUILD), "--parallel", "2"],
        ["ctest", "--test-dir", str(BUILD), "--output-on-failure", "--no-tests=error"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
