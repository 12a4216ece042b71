"""Finding, opening and checking a model checkpoint without loading it.

A checkpoint is a folder in Hugging Face's layout with safetensors weights. Only ``config.json`` and the
headers of the weight files are read here; the tensors stay where they are, as references.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daco_rt.artifacts.identity import ModelIdentity
from daco_rt.artifacts.tensors import DTYPES, TensorRef, read_header
from daco_rt.errors import CheckpointError, did_you_mean
from daco_rt.models import registry
from daco_rt.models.config import DecoderConfig

if TYPE_CHECKING:
    from daco_rt.models.family import FamilySpec

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_BUILT_IN = ("smol", "pocket")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_CHUNK = 1 << 20
# Mask of an element's exponent and mantissa, and the smallest such pattern that is no finite number.
_NON_FINITE = {"F32": (np.uint32, 0x7FFFFFFF, 0x7F800000), "F16": (np.uint16, 0x7FFF, 0x7C00),
               "BF16": (np.uint16, 0x7FFF, 0x7F80)}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    ``path`` is its folder, ``label`` what to call it in output, ``family`` the name of its family, ``config``
    its parsed ``config.json``, ``decoder`` the language model's sizes, ``tensors`` every stored tensor by
    stored name, ``canonical`` and ``vision`` the stored names behind the names that graphs use.
    """

    path: Path
    label: str
    family: str
    config: dict[str, Any]
    decoder: DecoderConfig
    tensors: Mapping[str, TensorRef]
    canonical: Mapping[str, str]
    vision: Mapping[str, str]

    def ref(self, name: str) -> TensorRef:
        """Return where a tensor lies, by stored or canonical name; raises ``CheckpointError`` if unknown."""
        stored = name if name in self.tensors else self.canonical.get(name, self.vision.get(name, ""))
        if stored not in self.tensors:
            raise CheckpointError(f"{self.path}: the checkpoint has no tensor {name!r}")
        return self.tensors[stored]

    def read(self, name: str) -> np.ndarray:
        """Return a read-only, memory-mapped array of a tensor, by stored or canonical name."""
        return self.ref(name).read()

    def text_weights(self) -> dict[str, TensorRef]:
        """Canonical name → reference of every tensor of the language model."""
        return {name: self.tensors[stored] for name, stored in self.canonical.items()}

    def vision_weights(self) -> dict[str, TensorRef]:
        """Canonical name → reference of every tensor of the vision tower and projector."""
        return {name: self.tensors[stored] for name, stored in self.vision.items()}


def resolve_checkpoint(
    family: str | None, checkpoint: str | Path | None = None, *, fetch: bool = True
) -> Checkpoint:
    """Find and open a checkpoint.

    Parameters
    ----------
    family : name of the model family ("internvl"), or None to take the one that ``config.json`` names.
    checkpoint : a folder, a hub id ("owner/name" or "owner/name@revision"), or a built-in name
        ("smol-internvl", "pocket-internvl", or short "smol", "pocket"). None means the family's smol model.
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


def model_identity(checkpoint: Checkpoint) -> ModelIdentity:
    """Return what artifacts record about the language model: sizes and 64 sampled weights.

    Sixteen values each from the closing norm and from the down projections of the first, middle and last
    block, at places that depend on nothing but the tensors' sizes.
    """
    c = checkpoint.decoder
    names = [f"layers.{i}.mlp.down_proj.weight" for i in (0, c.num_layers // 2, c.num_layers - 1)]
    samples: list[float] = []
    for stream, name in enumerate([*names, "norm.weight"]):
        values = checkpoint.read(name).reshape(-1)
        samples.extend(float(values[i]) for i in _places(stream, 16, values.size))
    if not np.isfinite(samples).all():
        raise CheckpointError(f"{checkpoint.path}: the weights contain NaN or infinity; the file is damaged")
    return ModelIdentity(
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        vocab_size=c.vocab_size,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        model_type=str(checkpoint.config.get("model_type", c.model_type)),
        samples=tuple(samples),
    )


def check_finite(
    refs: Iterable[TensorRef], *, at_most: int | None = None, progress: Callable[[int], None] | None = None
) -> None:
    """Raise ``CheckpointError`` naming the first tensor that holds NaN or infinity.

    Files are read in small pieces rather than mapped, so that a check's memory does not grow with the model.
    With ``at_most`` no more than about that many bytes are read, in pieces spread evenly over the weights.
    ``progress`` is called with the bytes just read.
    """
    refs = list(refs)
    every = 1 if at_most is None else max(1, -(-sum(ref.nbytes for ref in refs) // at_most))
    count = 0
    for ref in refs:
        kind, mask, limit = _NON_FINITE[ref.dtype]
        with open(ref.file, "rb", buffering=0) as file:
            for start in range(0, ref.nbytes, _CHUNK):
                count += 1
                if count % every:
                    continue
                raw = os.pread(file.fileno(), min(_CHUNK, ref.nbytes - start), ref.offset + start)
                if not raw or len(raw) % np.dtype(kind).itemsize:
                    raise CheckpointError(f"{ref.file}: ends inside tensor {ref.name!r}; download it again")
                if (np.frombuffer(raw, kind) & kind(mask)).max() >= limit:
                    raise CheckpointError(
                        f"{ref.file}: tensor {ref.name!r} holds NaN or infinity; the checkpoint is damaged or"
                        " was saved from a diverged training run"
                    )
                if progress is not None:
                    progress(len(raw))


def _places(stream: int, count: int, size: int) -> list[int]:
    """``count`` fixed positions below ``size``, by splitmix64: the same in every version of every library."""
    wrap, places = (1 << 64) - 1, []
    for i in range(count):
        z = (0x9E3779B97F4A7C15 * (stream * count + i + 1)) & wrap
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        places.append((z ^ (z >> 31)) % size)
    return places


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
        if ref.dtype not in _NON_FINITE:
            raise CheckpointError(
                f"{ref.file}: tensor {stored!r} is stored as {ref.dtype}; expected one of"
                f" {', '.join(name for name in DTYPES if name in _NON_FINITE)}"
            )
        found[name] = stored
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path}: the weights lack {missing[0]!r}{more}; the checkpoint is incomplete or its config.json"
            " belongs to another model"
        )
    return found
