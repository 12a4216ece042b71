"""What steering needs to know about a Hugging Face model: its blocks, its image tokens, its identity."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from daco_rt.artifacts import ModelIdentity, Pack
from daco_rt.errors import DacoError, PolicyError, UnsupportedError
from daco_rt.models import DecoderConfig, model_identity
from daco_rt.models.residual import text_model_of

_IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")


class Host(NamedTuple):
    """A model as steering sees it."""

    text: torch.nn.Module  # the module that holds ``layers``
    layers: torch.nn.ModuleList
    hidden_size: int
    image_token: int | None


def host_of(model: torch.nn.Module) -> Host:
    """Find the decoder blocks of a model.

    Raises
    ------
    UnsupportedError
        There are no blocks at ``model.language_model.layers`` or ``model.layers``.
    """
    text = text_model_of(model)
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedError(f"{type(model).__name__} has no config; pass a Hugging Face model")
    found = [getattr(config, name, None) for name in _IMAGE_TOKEN_FIELDS]
    image = next((token for token in found if token is not None), None)
    return Host(text, text.layers, int(_text_config(config).hidden_size), image)


def check_fits(pack: Pack, model: torch.nn.Module, host: Host) -> None:
    """Refuse a pack that was made for another model.

    Raises
    ------
    PolicyError
        The sizes or the sampled weights differ.
    """
    advice = "compile a pack for this model"
    if pack.dim != host.hidden_size:
        raise PolicyError(
            f"pack {pack.path} is for hidden size {pack.dim}, {type(model).__name__} has {host.hidden_size}; "
            f"{advice}"
        )
    if pack.blocks[-1] >= len(host.layers):
        raise PolicyError(
            f"pack {pack.path} steers block {pack.blocks[-1]}, {type(model).__name__} has {len(host.layers)} "
            f"blocks; {advice}"
        )
    identity = identity_of(model)
    difference = None if identity is None or not pack.model.samples else pack.model.difference(identity)
    if difference:
        raise PolicyError(f"pack {pack.path} does not fit {type(model).__name__}: {difference}; {advice}")


def identity_of(model: torch.nn.Module) -> ModelIdentity | None:
    """Return the identity of a loaded model, or None where its architecture has no known weight names.

    The same as ``daco_rt.models.model_identity`` gives for its checkpoint, up to the rounding of its dtype.

    Example
    -------
    >>> save_pack("packs/mine", model=identity_of(model), ...)
    """
    host = host_of(model)
    config = _text_config(model.config)  # type: ignore[union-attr]

    def read(name: str) -> np.ndarray:
        return host.text.get_parameter(name).detach().float().cpu().numpy()

    try:
        loaded = SimpleNamespace(
            decoder=DecoderConfig.from_hf(config.to_dict()),
            config={"model_type": model.config.model_type},  # type: ignore[union-attr]
            path=Path(str(getattr(model.config, "_name_or_path", ""))),  # type: ignore[union-attr]
            read=read,
        )
        return model_identity(loaded)  # type: ignore[arg-type]
    except (DacoError, AttributeError, NotImplementedError):
        return None


def to_torch(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an operand to a device; bf16, which NumPy does not have, goes by its bits."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(np.array(array)).to(device)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to NumPy; bf16 becomes fp32, which holds it exactly."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config
