"""The bundle: an exported model that runs by itself. Graphs, weights, pack, processor and a manifest."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daco_rt.artifacts.identity import ModelIdentity
from daco_rt.artifacts.manifest import MANIFEST, Progress, open_artifact
from daco_rt.artifacts.pack import Pack, load_pack
from daco_rt.artifacts.tensors import TensorRef, read_header
from daco_rt.errors import ArtifactError

DECODER = "decoder.onnx"
VISION = "vision.onnx"
PACK = "pack"
PROCESSOR = "processor"

PRECISIONS = ("fp32", "fp16", "bf16")
RUNTIMES = ("onnxruntime", "tensorrt")


@dataclass(frozen=True, eq=False)
class Bundle:
    """A loaded bundle.

    ``decoder`` is the decoder's configuration as a plain dict, ``embedding`` says in which safetensors file
    and under which name the token embeddings lie, ``image`` how image tokens stand in a prompt (None for a
    model without pictures), ``max_length`` the longest prompt plus answer in tokens, ``library_required``
    whether the graph runs only with the custom-op library, ``runtime`` which runtime the graph is written
    for, ``tensorrt`` what an engine is built from (``TensorRTPlan.to_dict``; None for another runtime),
    ``checks`` how far each file was checked.

    Example
    -------
    >>> bundle = load_bundle("bundles/internvl")
    >>> bundle.decoder_path.name
    'decoder.onnx'
    """

    path: Path
    family: str
    checkpoint: str
    precision: str
    max_length: int
    decoder: dict[str, Any]
    embedding: dict[str, Any]
    steered_blocks: tuple[int, ...]
    k_out: int
    image: dict[str, Any] | None
    library_required: bool
    model: ModelIdentity
    runtime: str
    tensorrt: dict[str, Any] | None
    manifest: dict[str, Any] = field(repr=False)
    checks: dict[str, str] = field(repr=False)

    @property
    def decoder_path(self) -> Path:
        return self.path / DECODER

    @property
    def vision_path(self) -> Path | None:
        """The vision tower's graph, or None if the bundle has none."""
        return self.path / VISION if VISION in self.manifest["files"] else None

    @property
    def processor_path(self) -> Path:
        return self.path / PROCESSOR

    def pack(self) -> Pack | None:
        """Return the bundle's pack, loaded on the first call, or None if no block is steered.

        Raises
        ------
        ArtifactError
            If the pack that lies there is not one that the graph can run.
        """
        return self._pack

    def embedding_ref(self) -> TensorRef:
        """Return where the token embeddings [vocab, d] lie on disk.

        Raises
        ------
        ArtifactError
            If the file has no such tensor.
        """
        file, name = self.path / self.embedding["file"], self.embedding["name"]
        refs = read_header(file)
        if name not in refs:
            raise ArtifactError(
                f"{file} has no tensor '{name}', which holds the embeddings; export the bundle again"
            )
        return refs[name]

    @functools.cached_property
    def _pack(self) -> Pack | None:
        if not self.steered_blocks:
            return None
        pack = load_pack(self.path / PACK, verify=False)
        if pack.blocks != self.steered_blocks:
            raise ArtifactError(
                f"{pack.path} steers blocks {list(pack.blocks)}, the graph {list(self.steered_blocks)}; "
                "put back a pack of those blocks, or export again"
            )
        for key, value in (self.manifest.get("steering") or {}).items():
            got = pack.signature().get(key)
            if got != value:
                raise ArtifactError(
                    f"{pack.path} has {key} = {got}, the graph was exported with {value}; put back a pack "
                    "of that kind, or export again"
                )
        difference = pack.model.difference(self.model)
        if difference is not None:
            raise ArtifactError(
                f"{pack.path} does not fit the bundle's model: {difference}; put another pack there"
            )
        return pack


def bundle_fields(
    *,
    family: str,
    checkpoint: str,
    precision: str,
    max_length: int,
    decoder: Mapping[str, Any],
    embedding: Mapping[str, Any],
    image: Mapping[str, Any] | None,
    library_required: bool,
    model: ModelIdentity,
    pack: Pack | None,
    k_out: int,
    tensorrt: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the manifest's keys for ``ArtifactWriter.set``; what the graph bakes in is taken from the pack.

    Example
    -------
    >>> writer.set(**bundle_fields(family="internvl", checkpoint="smol-internvl", pack=pack, ...))
    """
    return {
        "family": family,
        "checkpoint": checkpoint,
        "precision": precision,
        "max_length": max_length,
        "decoder": dict(decoder),
        "embedding": dict(embedding),
        "steered_blocks": [] if pack is None else list(pack.blocks),
        "steering": {} if pack is None else pack.signature(),
        "k_out": k_out,
        "image": None if image is None else dict(image),
        "library_required": library_required,
        "model": model.to_dict(),
        "runtime": "onnxruntime" if tensorrt is None else "tensorrt",
        "tensorrt": None if tensorrt is None else dict(tensorrt),
    }


def load_bundle(
    path: str | Path, verify: bool = True, full: bool = False, progress: Progress | None = None
) -> Bundle:
    """Open a bundle and check it.

    With ``verify`` every owned file is hashed, its pack is checked against the graph, and the headers of
    referenced shards are hashed; ``full`` hashes the shards' data too.

    Raises
    ------
    ArtifactError
        If a file is missing, damaged or of a newer version, or the pack does not fit the graph.
    """
    artifact = open_artifact(path, "bundle", verify=verify, full=full, progress=progress)
    path, data = artifact.path, artifact.manifest
    where = str(path / MANIFEST)
    try:
        bundle = Bundle(
            path=path,
            family=str(data["family"]),
            checkpoint=str(data["checkpoint"]),
            precision=str(data["precision"]),
            max_length=int(data["max_length"]),
            decoder=dict(data["decoder"]),
            embedding=dict(data["embedding"]),
            steered_blocks=tuple(int(block) for block in data["steered_blocks"]),
            k_out=int(data["k_out"]),
            image=None if data["image"] is None else dict(data["image"]),
            library_required=bool(data["library_required"]),
            model=ModelIdentity.from_dict(data["model"], where),
            # Bundles written before there was a choice were for ONNX Runtime.
            runtime=str(data.get("runtime", RUNTIMES[0])),
            tensorrt=None if data.get("tensorrt") is None else dict(data["tensorrt"]),
            manifest=data,
            checks=artifact.checks,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{where}: field {error} is missing or of another type; export the bundle again"
        ) from error
    if bundle.precision not in PRECISIONS or bundle.max_length < 1:
        raise ArtifactError(
            f"{where}: precision must be one of {', '.join(PRECISIONS)} and max_length at least 1, got "
            f"{bundle.precision!r} and {bundle.max_length}; export the bundle again"
        )
    if bundle.runtime not in RUNTIMES or (bundle.runtime == "tensorrt") != (bundle.tensorrt is not None):
        raise ArtifactError(
            f"{where}: runtime must be one of {', '.join(RUNTIMES)}, and tensorrt an object where it is "
            f"tensorrt, got {bundle.runtime!r}; export the bundle again"
        )
    artifact.file(DECODER)
    if {"file", "name"} - bundle.embedding.keys():
        raise ArtifactError(f"{where}: embedding must name a file and a tensor; export the bundle again")
    artifact.file(str(bundle.embedding["file"]))
    if bundle.steered_blocks:
        artifact.file(PACK)
        pack = bundle.pack() if verify or full else None
        if pack is not None:
            pack.check_values()
    return bundle
