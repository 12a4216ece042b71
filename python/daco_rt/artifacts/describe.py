"""What any artifact holds, as plain JSON values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.artifacts.bundle import load_bundle
from daco_rt.artifacts.concept import count_by
from daco_rt.artifacts.dictionary import load_dictionary
from daco_rt.artifacts.manifest import MANIFEST, read_manifest
from daco_rt.artifacts.pack import Pack, load_pack
from daco_rt.artifacts.sae import CONFIG, WEIGHTS, load_sae, read_config
from daco_rt.artifacts.tensors import read_header
from daco_rt.errors import ArtifactError


def describe(path: str | Path) -> dict[str, Any]:
    """Say what a folder is and what it holds. Nothing is hashed; sizes and headers are checked.

    Recognised: dictionaries, SAEs (ours and plain SAELens folders), packs, bundles, and model checkpoints
    (a folder with ``config.json``). ``kind`` in the result says which.

    Raises
    ------
    ArtifactError
        If the folder is none of these, or is damaged.

    Example
    -------
    >>> describe("packs/smol")["policies"][0]["name"]
    'default'
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file, expected a folder" if path.exists() else "does not exist"
        raise ArtifactError(f"{path} {what}; give the folder of an artifact, an SAE or a checkpoint")
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        kind = manifest["format"].removeprefix("daco_rt.")
        about = {
            "path": str(path),
            "kind": kind,
            "version": manifest["version"],
            "producer": manifest.get("producer"),
            "bytes": _owned_bytes(path, manifest),
            "referenced_bytes": sum(entry["bytes"] for entry in manifest["references"].values()),
        }
        details = {"pack": _pack, "bundle": _bundle, "dictionary": _dictionary, "sae": _sae}[kind]
        return about | details(path)
    if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        return {"path": str(path), "kind": "sae", "producer": "SAELens", "bytes": _folder_bytes(path)} | _sae(
            path
        )
    if (path / "config.json").is_file():
        return _checkpoint(path)
    raise ArtifactError(
        f"{path} holds no {MANIFEST}, {CONFIG} or config.json; give the folder of an artifact, an SAE or "
        "a checkpoint"
    )


def describe_pack(pack: Pack) -> dict[str, Any]:
    """Summarise a loaded pack: attributes, policies and what they edit, concepts, tensors."""
    return {
        **pack.signature(),
        "model": pack.model.to_dict(),
        "default_policy": pack.default_policy,
        "policies": [_policy(pack, index) for index in range(len(pack.policies))],
        "median_norm": {str(block): norm for block, norm in pack.median_norm.items()},
        "concepts": {
            "count": len(pack.concepts),
            "by_label": count_by(pack.concepts, "label"),
            "by_group": count_by(pack.concepts, "group"),
        },
        "operands": {
            name: {"dtype": ref.dtype, "shape": list(ref.shape)}
            for name, ref in pack.refs[pack.blocks[0]].items()
        },
        "recipe": pack.recipe,
    }


def _policy(pack: Pack, index: int) -> dict[str, Any]:
    """Summarise a policy; ``edited`` and ``undesirable`` count atoms block by block."""
    policy = pack.policies[index]
    edited: dict[str, int] = {}
    undesirable: dict[str, int] = {}
    shifted = []
    for block in policy.blocks:
        slot = int(pack.slot_map[pack.blocks.index(block), policy.slot])
        operands = pack.operands(block)
        if pack.op == "affine":
            touched = np.asarray(operands["b"][slot]).astype(np.float32).any(axis=0)
        else:
            touched = operands["gain"][slot] != 1
            undesirable[str(block)] = int(np.count_nonzero(operands["undesirable"][slot]))
            if operands["boost"].size:
                touched = touched | (operands["boost"][slot] != 0)
        edited[str(block)] = int(np.count_nonzero(touched))
        if operands["shift"][slot].any():
            shifted.append(block)
    return {
        "name": policy.name,
        "slot": policy.slot,
        "positions": policy.positions,
        "blocks": list(policy.blocks),
        "description": policy.description,
        "edited": edited,
        "undesirable": undesirable,
        "shifted_blocks": shifted,
    }


def _pack(path: Path) -> dict[str, Any]:
    return describe_pack(load_pack(path, verify=False))


def _bundle(path: Path) -> dict[str, Any]:
    bundle = load_bundle(path, verify=False)
    pack = bundle.pack()
    return {
        "family": bundle.family,
        "checkpoint": bundle.checkpoint,
        "runtime": bundle.runtime,
        "precision": bundle.precision,
        "max_length": bundle.max_length,
        "steered_blocks": list(bundle.steered_blocks),
        "k_out": bundle.k_out,
        "library_required": bundle.library_required,
        "vision": bundle.vision_path is not None,
        "image": bundle.image,
        "decoder": bundle.decoder,
        "model": bundle.model.to_dict(),
        "files": {rel: entry["bytes"] for rel, entry in bundle.manifest["files"].items()},
        "references": {rel: entry["bytes"] for rel, entry in bundle.manifest["references"].items()},
        "pack": describe_pack(pack) if pack is not None else None,
    }


def _dictionary(path: Path) -> dict[str, Any]:
    dictionary = load_dictionary(path, verify=False)
    return {
        "size": dictionary.size,
        "dim": dictionary.dim,
        "dtype": dictionary.dtype,
        "blocks": list(dictionary.blocks),
        "median_norm": {str(block): norm for block, norm in dictionary.median_norm.items()},
        "model": dictionary.model.to_dict(),
        "concepts": {
            "count": len(dictionary.concepts),
            "by_label": count_by(dictionary.concepts, "label"),
            "by_group": count_by(dictionary.concepts, "group"),
        },
        "recipe": dictionary.recipe,
    }


def _sae(path: Path) -> dict[str, Any]:
    sae = load_sae(path, verify=False)
    refs = read_header(path / WEIGHTS)
    return {
        "coder": sae.coder,
        "k": sae.k,
        "block": sae.block,
        "atoms": int(sae.encoder.shape[0]),
        "dim": int(sae.encoder.shape[1]),
        "dtype": refs["W_enc"].dtype,
        "hook": read_config(path).get("hook_name"),
        "model": sae.model.to_dict() if sae.model is not None else None,
        "annotation": {"count": len(sae.annotation), "by_label": count_by(sae.annotation, "label")},
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    """Summarise a model's folder from its ``config.json`` and the headers of its shards."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
        text = config.get("text_config", config)
        fields = {key: text.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged ({error}); fetch the checkpoint again") from error
    shards = sorted(path.glob("*.safetensors"))
    refs = [ref for shard in shards for ref in read_header(shard).values()]
    return {
        "path": str(path),
        "kind": "checkpoint",
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        **fields,
        "tensors": len(refs),
        "dtypes": sorted({ref.dtype for ref in refs}),
        "parameters": sum(int(np.prod(ref.shape, dtype=np.int64)) for ref in refs),
        "shards": [shard.name for shard in shards],
        "bytes": _folder_bytes(path),
    }


def _owned_bytes(path: Path, manifest: dict[str, Any]) -> int:
    inner = sum(_owned_bytes(path / rel, read_manifest(path / rel)) for rel in manifest["parts"])
    return inner + sum(entry["bytes"] for entry in manifest["files"].values())


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
