"""On-disk formats: dictionary, SAE, pack, bundle.

Folders that are written whole or not at all, and checked when read. NumPy and JSON only: no torch, no ONNX
Runtime, never pickle.
"""

from __future__ import annotations

from daco_rt.artifacts.bundle import Bundle, bundle_fields, load_bundle
from daco_rt.artifacts.concept import LABELS, Concept
from daco_rt.artifacts.describe import describe
from daco_rt.artifacts.dictionary import ConceptDictionary, load_dictionary, save_dictionary
from daco_rt.artifacts.identity import ModelIdentity
from daco_rt.artifacts.manifest import Artifact, open_artifact
from daco_rt.artifacts.pack import Pack, load_pack, save_pack
from daco_rt.artifacts.policy import POSITIONS, Policy
from daco_rt.artifacts.sae import Sae, load_sae, save_sae
from daco_rt.artifacts.store import ArtifactWriter, check_target, new_artifact
from daco_rt.artifacts.tensors import TensorRef, from_array, header_sha256, read_header, write_safetensors

__all__ = [
    "LABELS",
    "POSITIONS",
    "Artifact",
    "ArtifactWriter",
    "Bundle",
    "Concept",
    "ConceptDictionary",
    "ModelIdentity",
    "Pack",
    "Policy",
    "Sae",
    "TensorRef",
    "bundle_fields",
    "check_target",
    "describe",
    "from_array",
    "header_sha256",
    "load_bundle",
    "load_dictionary",
    "load_pack",
    "load_sae",
    "new_artifact",
    "open_artifact",
    "read_header",
    "save_dictionary",
    "save_pack",
    "save_sae",
    "write_safetensors",
]
