"""Finds and loads the compiled parts of the package.

========================== =============================== ==================================
part                       file in the package             used by
========================== =============================== ==================================
torch library              ``lib/libdaco_torch.so``        :mod:`daco_rt.ops`
ONNX Runtime library       ``lib/libdaco_onnxruntime.so``  sessions, Triton's onnxruntime backend
TensorRT plugin            ``lib/libdaco_trt_plugin.so``   exports for TensorRT, ``trtexec --dynamicPlugins``
extension module           ``_core*.so``                   :mod:`daco_rt.ops.numpy`
========================== =============================== ==================================

Each is built only where its framework's headers are found; what is missing is an error that says how to
build it.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import daco_rt
from daco_rt.errors import DacoError, did_you_mean

_LIBRARIES = {
    "torch": (
        "libdaco_torch.so",
        "install torch>=2.11, then run `pip install --no-build-isolation -e .` in the repository",
    ),
    "onnxruntime": (
        "libdaco_onnxruntime.so",
        "run cmake/fetch_onnxruntime_headers.sh (or set ONNXRUNTIME_INCLUDE_DIR), then"
        " `pip install --no-build-isolation -e .` in the repository",
    ),
    "tensorrt": (
        "libdaco_trt_plugin.so",
        "put nvcc on PATH and run cmake/fetch_tensorrt_headers.py (or set TENSORRT_INCLUDE_DIR), then"
        " `pip install --no-build-isolation -e .` in the repository",
    ),
}


def library_path(kind: str) -> Path:
    """Return where the shared library for ``"torch"``, ``"onnxruntime"`` or ``"tensorrt"`` lies.

    Raises
    ------
    DacoError
        If ``kind`` is unknown or this installation was built without that library.

    Example
    -------
    >>> import onnxruntime
    >>> options = onnxruntime.SessionOptions()
    >>> options.register_custom_ops_library(str(library_path("onnxruntime")))
    """
    if kind not in _LIBRARIES:
        raise DacoError(f"unknown library {kind!r}{did_you_mean(kind, _LIBRARIES)}")
    name, remedy = _LIBRARIES[kind]
    # An editable install has two package folders: the sources', and the one that the build installed into.
    for folder in daco_rt.__path__:
        path = Path(folder) / "lib" / name
        if path.is_file():
            return path
    raise DacoError(f"daco_rt was built without its {kind} library ({name}): {remedy}")


@functools.cache
def core() -> ModuleType:
    """Return the extension module with the kernels for NumPy arrays.

    Raises
    ------
    DacoError
        If this installation was built without it.
    """
    try:
        return importlib.import_module("daco_rt._core")
    except ModuleNotFoundError as error:
        raise DacoError(
            "daco_rt was built without its extension module (daco_rt._core): install nanobind and Python's"
            " headers, then run `pip install --no-build-isolation -e .` in the repository"
        ) from error


@functools.cache
def load_torch_library() -> Path:
    """Register the operators ``torch.ops.daco.*`` once and return the library's path.

    Raises
    ------
    DacoError
        If the library was not built, or the installed torch cannot load it.
    """
    import torch

    path = library_path("torch")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise DacoError(
            f"{path.name} does not load in torch {torch.__version__}: it needs torch>=2.11 ({error})"
        ) from error
    return path


def build_info() -> dict[str, Any]:
    """Return what this build is: versions, commit, compiler, instruction sets and libraries.

    Keys: ``version``, ``commit``, ``compiler``, ``isas`` (built) and ``best_isa`` (used on this machine),
    ``torch_headers``, ``onnxruntime_headers`` and ``tensorrt_headers`` (versions built against, empty if
    not built), ``cuda``, ``tensorrt`` (whether each was built), and ``libraries``, whether each shared
    library is installed.

    Example
    -------
    >>> build_info()["isas"]
    ['scalar', 'avx2', 'avx512']
    """
    info: dict[str, Any] = dict(core().build_info())
    info["isas"] = info["isas"].split()
    info["libraries"] = {kind: _is_built(kind) for kind in _LIBRARIES}
    return info


def _is_built(kind: str) -> bool:
    try:
        library_path(kind)
    except DacoError:
        return False
    return True
