"""Running an engine with TensorRT; torch holds the device memory and the stream.

Kept apart from the session and free of any decision, because it runs only where TensorRT and a GPU are.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from daco_rt.errors import ArtifactError, DacoError
from daco_rt.runtime.tensorrt_session import Port

# TensorRT's type name → NumPy's dtype and torch's name of it.
_TYPES: dict[str, tuple[Any, str]] = {
    "FLOAT": (np.float32, "float32"),
    "HALF": (np.float16, "float16"),
    "BF16": (ml_dtypes.bfloat16, "bfloat16"),
    "INT32": (np.int32, "int32"),
    "INT64": (np.int64, "int64"),
    "BOOL": (np.bool_, "bool"),
}


# Plugin libraries of this process: a registry keeps what it loaded, and loading one again is an error to some
# versions.
_loaded: set[str] = set()
_loading = threading.Lock()


def load_plugin(trt: ModuleType, library: Path) -> None:
    """Load a plugin library into TensorRT's registry, once a process.

    Raises
    ------
    DacoError
        TensorRT cannot load it.

    Example
    -------
    >>> load_plugin(tensorrt, Path("plugin/libdaco_trt_plugin.so"))           # doctest: +SKIP
    """
    path = str(library.resolve())
    with _loading:
        if path in _loaded:
            return
        if trt.get_plugin_registry().load_library(path) is None:
            raise DacoError(
                f"TensorRT {trt.__version__} cannot load {library}; build daco-rt for this machine and "
                "export again"
            )
        _loaded.add(path)


class TensorRTRunner:
    """An `EngineRunner` over a serialised engine.

    Parameters
    ----------
    plan : Path
        The serialised engine.
    plugin : Path, optional
        The plugin library that it needs.

    Raises
    ------
    DacoError
        TensorRT or a GPU is not at hand, or TensorRT cannot load the plugin.
    ArtifactError
        TensorRT does not take the plan: another version, another GPU, or damage.

    Example
    -------
    >>> runner = TensorRTRunner(Path("engine/decoder.plan"), None)            # doctest: +SKIP
    """

    def __init__(self, plan: Path, plugin: Path | None) -> None:
        try:
            import tensorrt as trt
        except ImportError as error:
            raise DacoError(
                f"TensorRT's Python module cannot be imported ({error}); install `tensorrt`, or run the "
                "bundle's portable form with the library off"
            ) from error
        import torch

        if not torch.cuda.is_available():
            raise DacoError(
                "an engine needs a GPU, and torch finds none (torch.cuda.is_available() is false)"
            )
        self._trt, self._torch = trt, torch
        self.version = str(trt.__version__)
        self._logger = trt.Logger(trt.Logger.ERROR)
        if plugin is not None:
            load_plugin(trt, plugin)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise ArtifactError(
                f"TensorRT {self.version} does not take {plan}: engines belong to one version and one GPU "
                "model; build it again here"
            )
        # A context an optimisation profile: switching one between profiles would synchronise at each change.
        self._contexts: dict[int, Any] = {}
        self._stream = torch.cuda.Stream()
        self._held: dict[int, dict[str, Any]] = {}
        self._input_names = frozenset(port.name for port in self.ports() if port.is_input)

    def ports(self) -> list[Port]:
        """Return inputs and outputs, in the engine's order."""
        engine, trt = self._engine, self._trt
        found = []
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            kind = engine.get_tensor_dtype(name).name
            if kind not in _TYPES:
                raise ArtifactError(
                    f"the engine's tensor {name} has type {kind}, which this runtime does not feed"
                )
            found.append(
                Port(
                    name,
                    tuple(engine.get_tensor_shape(name)),
                    np.dtype(_TYPES[kind][0]),
                    engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                )
            )
        return found

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return a device array of zeros."""
        return self._torch.zeros(shape, dtype=self._torch_dtype(dtype), device="cuda")

    def rows(self, array: Any, rows: NDArray[np.integer]) -> Any:
        """Return a device array of these rows alone, copied."""
        index = self._torch.as_tensor(np.asarray(rows, np.int64), device="cuda")
        return array.index_select(0, index)

    def run(
        self,
        profile: int,
        feed: Mapping[str, np.ndarray],
        outputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
        in_place: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """Run under a profile and wait for the result."""
        torch, context = self._torch, self._context(profile)
        held = self._held.setdefault(profile, {})
        # What torch did to the caches on its own stream comes first.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, array in feed.items():
                there = self._buffer(held, name, array.shape, array.dtype)
                there.copy_(_host(torch, array), non_blocking=True)
                context.set_input_shape(name, tuple(array.shape))
                context.set_tensor_address(name, there.data_ptr())
            for name, array in in_place.items():
                if name in self._input_names:
                    context.set_input_shape(name, tuple(array.shape))
                context.set_tensor_address(name, array.data_ptr())
            for name, (shape, dtype) in outputs.items():
                context.set_tensor_address(name, self._buffer(held, name, shape, dtype).data_ptr())
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise DacoError(
                    "TensorRT refused a run; its log on standard error says why (a shape outside the "
                    "profile, or the plugin's own sentence)"
                )
            host = {name: held[name].to("cpu", non_blocking=True) for name in outputs}
        self._stream.synchronize()
        return {name: _array(torch, host[name], outputs[name][1]) for name in outputs}

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(
                profile, self._stream.cuda_stream
            ):
                raise DacoError(
                    f"TensorRT cannot run profile {profile} of this engine, which has "
                    f"{self._engine.num_optimization_profiles}; is there enough device memory?"
                )
            self._stream.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]

    def _buffer(self, held: dict[str, Any], name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A device array that is kept between runs of equal shape, so that decoding allocates nothing."""
        if name not in held or tuple(held[name].shape) != tuple(shape):
            held[name] = self._torch.empty(tuple(shape), dtype=self._torch_dtype(dtype), device="cuda")
        return held[name]

    def _torch_dtype(self, dtype: np.dtype[Any]) -> Any:
        name = next(torch_name for kind, torch_name in _TYPES.values() if np.dtype(kind) == dtype)
        return getattr(self._torch, name)


def _host(torch: Any, array: np.ndarray) -> Any:
    """A torch view of a host array; torch knows no NumPy bfloat16, so its bits travel as int16."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(torch: Any, tensor: Any, dtype: np.dtype[Any]) -> np.ndarray:
    if dtype == ml_dtypes.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())
