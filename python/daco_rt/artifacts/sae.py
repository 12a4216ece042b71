"""Sparse autoencoders in the folder layout of SAELens, so that theirs load here and ours load there.

``cfg.json`` and ``sae_weights.safetensors`` (W_enc [d, m], W_dec [m, d], b_enc [m], b_dec [d], threshold [m]
for jumprelu), and beside them our ``manifest.json`` and ``annotation.jsonl`` (one concept a labelled
latent). A plain SAELens folder has only the first two. What is returned is what the operator wants: rows of
latents, every constant transformation of the input folded in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.artifacts.concept import Concept, check_concepts, concept_rows, read_concepts
from daco_rt.artifacts.identity import ModelIdentity
from daco_rt.artifacts.manifest import MANIFEST, open_artifact
from daco_rt.artifacts.operands import check_values
from daco_rt.artifacts.store import check_target, is_artifact, new_artifact
from daco_rt.artifacts.tensors import TensorRef, dtype_name, from_array, read_header
from daco_rt.errors import ArtifactError, UnsupportedError

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
ANNOTATION = "annotation.jsonl"

_CODERS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


@dataclass(frozen=True, eq=False)
class Sae:
    """An SAE ready for steering: codes are ``coder(encoder @ z + enc_bias)``, latent i writes ``decoder[i]``.

    ``block`` is the decoder block at whose output it reads; ``encoder`` and ``decoder`` are fp32 [m, d],
    ``enc_bias`` fp32 [m], ``threshold`` fp32 [m] (jumprelu) or None, ``k`` None for coders without one.
    ``model`` and ``annotation`` are empty for a plain SAELens folder. ``decoder_bias`` fp32 [d] is what a
    full reconstruction adds, ``codes @ decoder + decoder_bias``; steering does not need it.
    """

    path: Path
    block: int
    coder: str
    k: int | None
    encoder: np.ndarray = field(repr=False)
    enc_bias: np.ndarray = field(repr=False)
    decoder: np.ndarray = field(repr=False)
    threshold: np.ndarray | None = field(repr=False)
    model: ModelIdentity | None
    annotation: tuple[Concept, ...]
    config: dict[str, Any] = field(repr=False)
    decoder_bias: np.ndarray | None = field(default=None, repr=False)


def load_sae(path: str | Path, verify: bool = True) -> Sae:
    """Load an SAE folder, ours or SAELens's own, and fold it for steering.

    Folded into the encoder: the pre-bias (``apply_b_dec_to_input``), decoder-norm rescaling
    (``rescale_acts_by_decoder_norm``), and a constant factor on the input if the configuration records it as
    ``norm_scaling_factor``. ``hook_resid_pre`` of block ℓ is the output of ℓ − 1.

    Raises
    ------
    ArtifactError
        If a file is missing or damaged, a shape does not fit, or a weight is not finite.
    UnsupportedError
        For other architectures (gated, transcoders), layer normalisation, an input factor that is not
        recorded, and hooks other than the residual stream.

    Example
    -------
    >>> sae = load_sae("saes/block15")
    >>> sae.encoder.shape == sae.decoder.shape
    True
    """
    path = Path(path)
    model, annotation = None, None
    if is_artifact(path):
        manifest = open_artifact(path, "sae", verify=verify).manifest
        model = ModelIdentity.from_dict(manifest.get("model"), str(path / MANIFEST))
        annotation = path / ANNOTATION
    config = read_config(path)
    block, coder, k = _read_architecture(config, path / CONFIG)
    refs = read_header(path / WEIGHTS)
    m, _ = _check_weights(
        {name: (ref.dtype, ref.shape) for name, ref in refs.items()}, config, coder, path / WEIGHTS
    )
    weights = {name: _float32(ref) for name, ref in refs.items()}
    for name, array in weights.items():
        check_values(name, array, str(path / WEIGHTS))
    if k is not None and k > m:
        raise ArtifactError(f"{path / CONFIG}: k = {k} is larger than the {m} latents; lower k")
    scale = _input_scale(config, path / CONFIG)
    encoder = np.ascontiguousarray(weights["W_enc"].T)
    decoder, bias = weights["W_dec"], weights["b_enc"]
    if config.get("apply_b_dec_to_input", True):
        bias = (bias - encoder.astype(np.float64) @ weights["b_dec"]).astype(np.float32)
    encoder, decoder = encoder * np.float32(scale), decoder / np.float32(scale)
    if config.get("rescale_acts_by_decoder_norm", False):
        norms = np.linalg.norm(weights["W_dec"], axis=1)
        if not norms.all():
            raise ArtifactError(
                f"{path / WEIGHTS}: W_dec has zero rows, so acts cannot be rescaled by its norms"
            )
        encoder, bias, decoder = encoder * norms[:, None], bias * norms, decoder / norms[:, None]
    decoder_bias = (weights["b_dec"] / np.float32(scale)).astype(np.float32)
    # SAELens applies a ReLU before the threshold, so a negative one means 0.
    threshold = np.maximum(weights["threshold"], 0) if coder == "jumprelu" else None
    return Sae(
        path, block, coder, k, encoder, bias, decoder, threshold, model,
        read_concepts(annotation, m) if annotation is not None else (), config, decoder_bias,
    )  # fmt: skip


def save_sae(
    path: str | Path,
    *,
    model: ModelIdentity,
    block: int,
    coder: str,
    weights: Mapping[str, np.ndarray],
    k: int | None = None,
    annotation: Iterable[Concept] = (),
    apply_b_dec_to_input: bool = True,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Sae:
    """Write an SAE folder in one step and return it as loaded.

    Parameters
    ----------
    path : the folder to make.
    block : the decoder block whose output it reads.
    coder : "relu", "topk" (needs ``k``) or "jumprelu" (needs ``threshold``).
    weights : by SAELens's names: W_enc [d, m], W_dec [m, d], b_enc [m], b_dec [d], threshold [m]; fp32, fp16
        or bf16.
    annotation : labelled latents.
    apply_b_dec_to_input : whether the encoder was trained on z − b_dec.
    recipe : how it was trained, any JSON.

    Raises
    ------
    ArtifactError
        If something does not fit or is not finite, or the folder may not be written.
    """
    where = f"SAE {path}"
    check_target(path, overwrite=overwrite)
    architecture = {ours: theirs for theirs, ours in _CODERS.items()}.get(coder)
    if architecture is None:
        raise ArtifactError(f"{where}: coder must be one of {', '.join(_CODERS.values())}, got {coder!r}")
    if (coder == "topk") != (k is not None):
        raise ArtifactError(
            f"{where}: k must be given for topk and only for topk, got coder {coder!r} and k {k}"
        )
    if "W_enc" not in weights or weights["W_enc"].ndim != 2:
        raise ArtifactError(f"{where}: weights must hold the matrix W_enc [d, m]")
    d, m = weights["W_enc"].shape
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": d,
        "d_sae": m,
        "dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(dtype_name(weights["W_enc"])),
        "device": "cpu",
        "apply_b_dec_to_input": apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": f"blocks.{block}.hook_resid_post", "model_name": model.model_type},
    }
    if k is not None:
        config |= {"k": k, "rescale_acts_by_decoder_norm": False}
    _check_weights(
        {name: (dtype_name(a), tuple(a.shape)) for name, a in weights.items()},
        config,
        coder,
        Path(path) / WEIGHTS,
    )
    if k is not None and not 1 <= k <= m:
        raise ArtifactError(f"{where}: k must be from 1 to the {m} latents, got {k}")
    for name, array in weights.items():
        check_values(name, array, where)
    table = check_concepts(annotation, m, where)
    with new_artifact(path, "sae", overwrite=overwrite) as writer:
        writer.set(
            model=model.to_dict(), block=block, coder=coder, k=k, atoms=m, dim=d, recipe=dict(recipe or {})
        )
        writer.add_json(CONFIG, config)
        writer.write_safetensors(WEIGHTS, {name: from_array(array) for name, array in weights.items()})
        writer.add_jsonl(ANNOTATION, concept_rows(table))
    return load_sae(path, verify=False)


def read_config(path: Path) -> dict[str, Any]:
    """Read ``cfg.json`` of an SAE folder; keys of its ``metadata`` move to the top where missing there."""
    file = path / CONFIG
    try:
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{file} does not exist; expected an SAE folder with {CONFIG} and {WEIGHTS}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged ({error}); fetch or make the SAE again") from error
    for nested in ("metadata", "meta"):
        if isinstance(config.get(nested), dict):
            config = {**config[nested], **config}
    return config


def _read_architecture(config: Mapping[str, Any], file: Path) -> tuple[int, str, int | None]:
    """Return block, coder and k; refuse by name what steering has no form for."""
    architecture = config.get("architecture", "standard")
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    elif activation not in ("relu", "topk"):
        raise UnsupportedError(
            f"{file}: activation {activation!r} is not supported; relu, topk and jumprelu are"
        )
    if architecture not in _CODERS:
        raise UnsupportedError(
            f"{file}: architecture {architecture!r} is not supported; {', '.join(_CODERS)} are: train or "
            "choose another SAE"
        )
    if config.get("finetuning_scaling_factor"):
        raise UnsupportedError(
            f"{file}: a finetuning_scaling_factor is not supported; fold it into W_dec first"
        )
    hook = str(config.get("hook_name", config.get("hook_point")))
    match = _HOOK.fullmatch(hook)
    block = int(match[1]) - (match[2] == "pre") if match else -1
    if block < 0:
        raise UnsupportedError(
            f"{file}: hook {hook!r} is not the output of a decoder block; blocks.N.hook_resid_post and "
            "blocks.N.hook_resid_pre with N of at least 1 are supported"
        )
    out = config.get("hook_name_out")
    if out not in (None, hook):
        raise UnsupportedError(f"{file}: reads {hook} and writes {out}: transcoders are not supported")
    k = None
    if architecture == "topk":
        k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
        if type(k) is not int or k < 1:
            raise ArtifactError(f"{file}: topk needs an integer k of at least 1, got {k!r}")
    return block, _CODERS[architecture], k


def _input_scale(config: Mapping[str, Any], file: Path) -> float:
    """Return the constant factor on the input, 1 if there is none."""
    kind = config.get("normalize_activations", "none")
    if kind in ("none", None, False):
        return 1.0
    if kind not in ("constant_norm_rescale", "expected_average_only_in"):
        raise UnsupportedError(
            f"{file}: normalize_activations {kind!r} depends on the row; it cannot be folded in"
        )
    factor = config.get("norm_scaling_factor")
    if not isinstance(factor, (int, float)) or not 0 < factor < np.inf:
        raise UnsupportedError(
            f"{file}: normalize_activations {kind!r} without its constant; record norm_scaling_factor in "
            f"{file.name}"
        )
    return float(factor)


def _check_weights(
    specs: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any], coder: str, file: Path
) -> tuple[int, int]:
    """Return m and d after checking the tensors against the configuration."""
    d, m = config.get("d_in"), config.get("d_sae")
    if type(d) is not int or type(m) is not int or d < 1 or m < 1:
        raise ArtifactError(
            f"{file.parent / CONFIG}: d_in and d_sae must be integers of at least 1, got {d!r} and {m!r}"
        )
    expected: dict[str, tuple[int, ...]] = {"W_enc": (d, m), "W_dec": (m, d), "b_enc": (m,), "b_dec": (d,)}
    if coder == "jumprelu":
        expected["threshold"] = (m,)
    odd = sorted(expected.keys() ^ specs.keys())
    if odd:
        what = "is missing" if odd[0] in expected else "is unknown, so this is another kind of SAE"
        raise ArtifactError(f"{file}: tensor '{odd[0]}' {what}; a {coder} SAE has {', '.join(expected)}")
    for name, (dtype, shape) in specs.items():
        if shape != expected[name] or dtype not in ("F32", "F16", "BF16"):
            raise ArtifactError(
                f"{file}: '{name}' must be F32, F16 or BF16 {list(expected[name])}, got {dtype} {list(shape)}"
            )
    return m, d


def _float32(ref: TensorRef) -> np.ndarray:
    return ref.read().astype(np.float32)
