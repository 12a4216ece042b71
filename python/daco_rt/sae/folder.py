"""Writing an SAE again with something changed: its annotation, or its coder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.artifacts import Concept, ModelIdentity, Sae, read_header, save_sae
from daco_rt.artifacts.manifest import read_manifest
from daco_rt.artifacts.sae import WEIGHTS
from daco_rt.artifacts.store import is_artifact
from daco_rt.errors import ArtifactError


def rewrite_sae(
    sae: Sae,
    output: str | Path,
    *,
    coder: str | None = None,
    threshold: np.ndarray | None = None,
    annotation: Iterable[Concept] | None = None,
    model: ModelIdentity | None = None,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Sae:
    """Write a loaded SAE as a folder of ours; what is not given stays as it is.

    The weights go over byte for byte, except where a transformation of the input had to be folded in. The old
    recipe is kept, the keys of ``recipe`` are added to it.

    Raises
    ------
    ArtifactError
        If neither ``model`` nor the SAE says which model it is for, or the folder may not be written.

    Example
    -------
    >>> rewrite_sae(load_sae("saes/from-the-hub"), "saes/mine", model=identity)
    """
    identity = model or sae.model
    if identity is None:
        raise ArtifactError(f"SAE {sae.path} does not say which model it is for; give the model's identity")
    if model is not None and sae.model is not None and sae.model.difference(model):
        raise ArtifactError(f"SAE {sae.path} is of another model: {sae.model.difference(model)}")
    weights, before = _weights(sae)
    if threshold is not None:
        weights["threshold"] = threshold.astype(np.float32)
    coder = coder or sae.coder
    old = read_manifest(sae.path, "sae").get("recipe", {}) if is_artifact(sae.path) else {}
    return save_sae(
        output,
        model=identity,
        block=sae.block,
        coder=coder,
        k=sae.k if coder == "topk" else None,
        weights=weights,
        annotation=sae.annotation if annotation is None else annotation,
        apply_b_dec_to_input=before,
        recipe={**old, **(recipe or {})},
        overwrite=overwrite,
    )


def _weights(sae: Sae) -> tuple[dict[str, np.ndarray], bool]:
    """Return the weights by SAELens's names, and whether b_dec is taken off the input."""
    config = sae.config
    plain = config.get("normalize_activations", "none") in ("none", None, False)
    if plain and not config.get("rescale_acts_by_decoder_norm", False):
        # Copied, since the output may replace the file that they are mapped from.
        weights = {name: np.array(ref.read()) for name, ref in read_header(sae.path / WEIGHTS).items()}
        return weights, bool(config.get("apply_b_dec_to_input", True))
    bias = np.zeros(sae.encoder.shape[1], np.float32) if sae.decoder_bias is None else sae.decoder_bias
    weights = {
        "W_enc": np.ascontiguousarray(sae.encoder.T),
        "b_enc": sae.enc_bias,
        "W_dec": sae.decoder,
        "b_dec": bias,
    }
    if sae.threshold is not None:
        weights["threshold"] = sae.threshold
    return weights, False
