"""Building engines: graphs in, plans out, and a record of what they were built from.

TensorRT's Python module is an argument, so that another build of it with the same interface can take its
place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from daco_rt._files import atomic_directory, sha256_file
from daco_rt.artifacts.bundle import Bundle
from daco_rt.artifacts.engine import (
    DECODER_PLAN,
    ENGINE,
    RECORD,
    VISION_PLAN,
    TensorRTPlan,
    engine_record,
    plugin_path,
)
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.export.tensorrt.profiles import Profile, Shapes, decoder_profiles, vision_profiles
from daco_rt.runtime.tensorrt_engine import load_plugin

OLDEST = (10, 15)
"""The first TensorRT that updates a cache in place."""


@dataclass(frozen=True)
class Built:
    """A serialised engine and how its network came about."""

    plan: Any
    """A buffer with the serialised engine."""
    layers: int
    plugins: int
    """Layers that are plugins."""


def import_tensorrt() -> ModuleType:
    """Import TensorRT's Python module.

    Raises
    ------
    DacoError
        It is not installed, cannot be loaded, or is older than an in-place cache needs.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise DacoError(
            f"TensorRT's Python module cannot be imported ({error}); install `tensorrt` with its libraries"
        ) from error
    # Any folder of that name on the path can be imported, and is empty.
    if getattr(tensorrt, "__version__", None) is None:
        raise DacoError(
            "`tensorrt` on Python's path is a folder, not TensorRT; install `tensorrt` with its libraries"
        )
    check_version(tensorrt)
    found: ModuleType = tensorrt
    return found


def check_version(trt: ModuleType) -> None:
    """Refuse a TensorRT without in-place caches."""
    version = str(trt.__version__)
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if parts < OLDEST:
        raise DacoError(
            f"TensorRT {version} cannot update a cache in place: {OLDEST[0]}.{OLDEST[1]} or later is needed"
        )


def check_plugin(library: Path, sha256: str | None) -> None:
    """Refuse a plugin library that is missing or is not the one with that hash.

    Raises
    ------
    ArtifactError
        Naming the file.
    """
    if not library.is_file():
        raise ArtifactError(f"{library} is missing; export the bundle again")
    if sha256 is not None and sha256_file(library) != sha256:
        raise ArtifactError(f"{library} is not the plugin that the bundle was exported with; export it again")


def build_engine(
    trt: ModuleType, graph: Path, profiles_of: Callable[[Shapes], list[Profile]], *, plugins: int = 0
) -> Built:
    """Parse a graph and build its engine, strongly typed.

    Parameters
    ----------
    trt : TensorRT's Python module.
    graph : the ONNX file; its external data lie beside it.
    profiles_of : from the inputs' shapes to the optimisation profiles.
    plugins : how many steering plugins the network must hold. 0 takes the portable functions instead, for a
        TensorRT that has no plugins.

    Raises
    ------
    DacoError
        The graph does not parse or build; the sentence carries TensorRT's own words.
    """
    logger = _Logger.of(trt)
    builder = trt.Builder(logger)
    # Since TensorRT 11 networks are always strongly typed and the flag may be gone.
    flag = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        said = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise DacoError(
            f"TensorRT {trt.__version__} does not take {graph}: {_one_line(said) or logger.last()}"
        )
    found = sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))
    if found != plugins:
        raise DacoError(
            f"{graph}: TensorRT made {found} plugin layer(s) where {plugins} blocks are steered; load the "
            "plugin library of the bundle, and no other of that name"
        )
    config = builder.create_builder_config()
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    for shapes in profiles_of(inputs):
        profile = builder.create_optimization_profile()
        for name, (low, likely, high) in shapes.items():
            profile.set_shape(name, low, likely, high)
        if config.add_optimization_profile(profile) < 0:
            raise DacoError(f"{graph}: TensorRT refused a profile: {logger.last()}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise DacoError(f"TensorRT {trt.__version__} cannot build {graph}: {logger.last()}")
    return Built(plan, int(network.num_layers), int(found))


def build_engines(
    bundle: Bundle,
    trt: ModuleType,
    *,
    operators: str = "plugin",
    device: str | None = None,
    compute: str | None = None,
    given: dict[str, Path] | None = None,
) -> Path:
    """Build a bundle's engines into its folder ``engine`` and return that folder.

    The folder appears whole: until then an older engine stays.

    Parameters
    ----------
    bundle : exported for TensorRT.
    trt : TensorRT's Python module.
    operators : "plugin", or "functions" for a TensorRT without plugins.
    device, compute : of the GPU in use; by default asked of torch.
    given : plans that were built elsewhere, ``{"decoder.plan": path}``, to be recorded instead of built.

    Raises
    ------
    DacoError
        The plugin, a graph or a plan is refused.
    """
    plan = TensorRTPlan.of(bundle)
    steered = len(bundle.steered_blocks)
    if device is None or compute is None:
        device, compute = current_device()
    if steered and operators == "plugin":
        check_plugin(plugin_path(bundle), plan.plugin_sha256)
        # A plan that was built elsewhere is recorded without TensorRT's help.
        if given is None:
            load_plugin(trt, plugin_path(bundle))
    with atomic_directory(bundle.path / ENGINE, overwrite=True) as folder:
        for name, graph, profiles_of, plugins in (
            (DECODER_PLAN, bundle.decoder_path, decoder_profiles, steered if operators == "plugin" else 0),
            (VISION_PLAN, bundle.vision_path, vision_profiles, 0),
        ):
            if graph is None:
                continue
            if given is not None:
                if name in given:
                    (folder / name).write_bytes(given[name].read_bytes())
                continue
            built = build_engine(trt, graph, partial(profiles_of, plan=plan), plugins=plugins)
            with open(folder / name, "wb") as file:
                file.write(memoryview(built.plan))
        record = engine_record(
            bundle,
            folder,
            tensorrt=str(trt.__version__),
            device=device,
            compute=compute,
            operators=operators if steered else "none",
        )
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return bundle.path / ENGINE


def current_device() -> tuple[str, str]:
    """Return name and compute capability of the GPU in use; raises ``DacoError`` where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise DacoError("no GPU is usable here (torch.cuda.is_available() is false)")
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}"


class _Logger:
    """Makes a logger of TensorRT's own class that keeps warnings apart from errors."""

    @staticmethod
    def of(trt: ModuleType) -> Any:
        class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                super().__init__()
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if int(severity) <= int(trt.ILogger.ERROR):
                    self.errors.append(message)

            def last(self) -> str:
                return _one_line(self.errors[-1]) if self.errors else "it gave no reason"

        return Logger()


def _one_line(text: str) -> str:
    return " ".join(text.split())
