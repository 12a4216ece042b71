#!/usr/bin/env python3
"""Fetch TensorRT's C++ headers (10.14.1) into build/deps/tensorrt/include, to compile the plugin against.

They are Apache-2.0 and come out of a Python wheel that carries them, pinned by its hash. Nothing of the wheel
is installed or run. Does nothing when the headers are there, or when TENSORRT_INCLUDE_DIR names a copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "kernel-lens==2.0.1"
SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
INSIDE = "kernel_lens/include/tensorrt/"
# Those that NvInfer.h reaches. The wheel's NvInferPlugin.h is not TensorRT's own file and is left out.
HEADERS = (
    "NvInfer.h",
    "NvInferImpl.h",
    "NvInferLegacyDims.h",
    "NvInferPluginBase.h",
    "NvInferRuntime.h",
    "NvInferRuntimeBase.h",
    "NvInferRuntimeCommon.h",
    "NvInferRuntimePlugin.h",
    "NvInferVersion.h",
)
ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "build" / "deps" / "tensorrt" / "include"


def main() -> int:
    """Return the exit code: 0 when the headers are there, 2 with a sentence on stderr when they cannot be."""
    if all((TARGET / name).is_file() for name in HEADERS):
        return 0
    if given := os.environ.get("TENSORRT_INCLUDE_DIR"):
        if (Path(given) / "NvInferRuntime.h").is_file():
            return 0
        print(
            f"TENSORRT_INCLUDE_DIR={given} has no NvInferRuntime.h; unset it or name the folder that has",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "wheel.txt").write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "5"]
        command += ["--require-hashes", "-r", str(work / "wheel.txt"), "-d", str(work)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["pip said nothing"]
            print(
                f"could not fetch the headers of TensorRT ({WHEEL}): {said[-1]}; check the network, or set "
                "TENSORRT_INCLUDE_DIR to a folder with NvInferRuntime.h",
                file=sys.stderr,
            )
            return 2
        unpacked = work / "include"
        unpacked.mkdir()
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            for name in HEADERS:
                (unpacked / name).write_bytes(wheel.read(INSIDE + name))
        # Whole or not at all: a folder that is half there would pass for a copy of the headers.
        shutil.rmtree(TARGET, ignore_errors=True)
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        partial = TARGET.with_name("include.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(unpacked, partial)
        partial.rename(TARGET)
    print(f"headers of TensorRT 10.14.1: {TARGET.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
