"""Finding a checkpoint (a folder, a hub id or a built-in name) and opening it without loading it.

Whatever can be wrong with one is refused here, by name: another layout, another family, missing or truncated
shards, tensors that contradict ``config.json``. Only that file and the weights' headers are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from daco_rt.artifacts.tensors import DTYPES, TensorRef, read_header
from daco_rt.errors import CheckpointError, did_you_mean
from daco_rt.models import registry
from daco_rt.models.checkpoint import NON_FINITE, Checkpoint
from daco_rt.models.family import FamilySpec

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_BUILT_IN = ("smol", "scenes", "pocket")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def resolve_checkpoint(
    family: str | None, checkpoint: str | Path | None = None, *, fetch: bool = True
) -> Checkpoint:
    """Find and open a checkpoint.

    Parameters
    ----------
    family : name of the model family ("internvl"), or None to take the one that ``config.json`` names.
    checkpoint : a folder, a hub id ("owner/name" or "owner/name@revision"), or a built-in name
        ("smol-internvl", "scenes-internvl", "pocket-internvl", or short "smol", "scenes", "pocket"). None
        means the family's smol model.
    fetch : whether something that is not on this machine may be downloaded.

    Raises
    ------
    CheckpointError
        Nothing is found there, or it is damaged, incomplete, of another family or of an unsupported format.
    UnsupportedError
        The model has a feature that the graphs do not implement.

    Example
    -------
    >>> resolve_checkpoint("internvl", "/models/InternVL3-1B-hf").decoder.num_layers
    24
    """
    spec = None if family is None else registry.family(family)
    path, label = _locate(spec, checkpoint, fetch)
    return _open(spec, path, label)


def _locate(spec: FamilySpec | None, checkpoint: str | Path | None, fetch: bool) -> tuple[Path, str]:
    text = "smol" if checkpoint is None else str(checkpoint)
    folder = Path(text).expanduser()
    built_in = _built_in(spec, text)
    if built_in is not None and not (checkpoint is not None and folder.is_dir()):
        return _ensure(built_in, fetch), built_in
    if folder.is_dir():
        return folder.resolve(), str(folder.resolve())
    if folder.exists():
        raise CheckpointError(f"checkpoint {text} is a file; pass the folder that holds its config.json")
    if isinstance(checkpoint, str) and _HUB_ID.fullmatch(text) and not text.startswith("."):
        from daco_rt.models.hub import download

        return download(text, lambda config: _refuse(spec, config, text), local_only=not fetch), text
    names = [f"{size}-{name}" for size in _BUILT_IN for name in registry.families()]
    hint = did_you_mean(text, names) if "/" not in text else ""
    raise CheckpointError(f"checkpoint {text} is neither a folder, a hub id nor a built-in model{hint}")


def _built_in(spec: FamilySpec | None, text: str) -> str | None:
    """The full name of a built-in checkpoint, if ``text`` is one."""
    size, _, name = text.partition("-")
    if size not in _BUILT_IN:
        return None
    if not name:
        if spec is None:
            raise CheckpointError(f"checkpoint {text!r} needs a model family; write '{text}-internvl'")
        return f"{size}-{spec.name}"
    return text if name in registry.families() else None


def _ensure(name: str, fetch: bool) -> Path:
    from daco_rt.models import catalogue, smol

    # The pocket model is made from what the package holds; smol's language model has to be downloaded.
    if name == smol.NAME and not fetch and not smol.is_built():
        raise CheckpointError(f"{name} is not on this machine; get it with 'daco-rt models get {name}'")
    return catalogue.ensure(name)


def _open(spec: FamilySpec | None, path: Path, label: str) -> Checkpoint:
    config = _read_json(path / "config.json", "pass the folder of a Hugging Face checkpoint")
    spec = _refuse(spec, config, label)
    tensors = _read_tensors(path)
    head = any(name in tensors for name in spec.head_names)
    decoder = spec.decoder_config(config, head)
    text = _names(path, tensors, decoder.tensor_shapes(), spec.text_prefixes, spec.head_names)
    vision = _names(path, tensors, spec.vision_shapes(config), spec.vision_prefixes, ())
    return Checkpoint(path, label, spec.name, config, decoder, tensors, text, vision)


def _refuse(spec: FamilySpec | None, config: Mapping[str, Any], label: str) -> FamilySpec:
    """Return the family of ``config``, or raise: another family, another layout, quantised weights."""
    for candidate in registry.families().values() if spec is None else (spec,):
        if (sentence := candidate.redirect(config, label)) is not None:
            raise CheckpointError(sentence)
    found = registry.ARCHITECTURES[registry.architecture_of(config, label)]
    if spec is not None and found.name != spec.name:
        raise CheckpointError(f"{label} is a model of family '{found.name}'; pass --model {found.name}")
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "unknown")
        raise CheckpointError(
            f"{label} holds quantised weights ({method}), which are not supported; use the checkpoint they"
            " were made from"
        )
    return found


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; {hint}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(value).__name__}; restore it")
    return value


def _read_tensors(path: Path) -> dict[str, TensorRef]:
    """Read the headers of the weight files: one file, or the shards that an index names."""
    if (path / _WEIGHTS).is_file():
        return read_header(path / _WEIGHTS, CheckpointError)
    if (path / _INDEX).is_file():
        return _read_shards(path)
    if pickled := sorted(p.name for p in path.glob("*.bin")):
        raise CheckpointError(
            f"{path} has only pickled weights ({pickled[0]}), which can run code and are never loaded; use a"
            " checkpoint with safetensors weights"
        )
    raise CheckpointError(f"{path} has neither {_WEIGHTS} nor {_INDEX}; download the checkpoint again")


def _read_shards(path: Path) -> dict[str, TensorRef]:
    table = _read_json(path / _INDEX, "download the checkpoint again").get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{path / _INDEX} has no weight_map; download it again")
    headers: dict[str, dict[str, TensorRef]] = {}
    for file in sorted({str(f) for f in table.values()}):
        if Path(file).name != file:
            raise CheckpointError(f"{path / _INDEX} names {file!r}, which lies outside the folder")
        if not (path / file).is_file():
            raise CheckpointError(f"{path / file} is missing; {_INDEX} names it: download it again")
        headers[file] = read_header(path / file, CheckpointError)
    tensors = {}
    for name, file in table.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{path / file} does not hold the tensor {name!r} that {_INDEX} places there; index and shard"
                " belong to different downloads: get both again"
            )
        tensors[name] = headers[file][name]
    return tensors


def _names(
    path: Path,
    tensors: Mapping[str, TensorRef],
    shapes: Mapping[str, tuple[int, ...]],
    prefixes: Iterable[str],
    head_names: Iterable[str],
) -> dict[str, str]:
    """Map canonical to stored names; every tensor must be there, in the right shape and a float type."""
    found: dict[str, str] = {}
    missing: list[str] = []
    for name, shape in shapes.items():
        places = head_names if name == "lm_head.weight" else [prefix + name for prefix in prefixes]
        stored = next((place for place in places if place in tensors), None)
        if stored is None:
            missing.append(name)
            continue
        ref = tensors[stored]
        if tuple(ref.shape) != shape:
            raise CheckpointError(
                f"{ref.file}: tensor {stored!r} has shape {list(ref.shape)}, config.json asks for"
                f" {list(shape)}; weights and config.json belong to different models"
            )
        if ref.dtype not in NON_FINITE:
            raise CheckpointError(
                f"{ref.file}: tensor {stored!r} is stored as {ref.dtype}; expected one of"
                f" {', '.join(name for name in DTYPES if name in NON_FINITE)}"
            )
        found[name] = stored
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path}: the weights lack {missing[0]!r}{more}; the checkpoint is incomplete or its config.json"
            " belongs to another model"
        )
    return found
