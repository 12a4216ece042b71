"""What turns captions and pictures into vectors: CLIP and SigLIP models, or a sentence embedder for text
alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from daco_rt.errors import CheckpointError, UnsupportedError


class Encoder(Protocol):
    """Embeds texts, and pictures where ``has_images``; vectors are fp32 [n, dim] of norm 1."""

    dim: int
    has_images: bool

    def texts(self, texts: Sequence[str]) -> np.ndarray: ...
    def images(self, images: Sequence[Any]) -> np.ndarray: ...
    def describe(self) -> dict[str, Any]: ...


class HubEncoder:
    """A Hugging Face model as an encoder.

    Parameters
    ----------
    model : with ``get_text_features`` and ``get_image_features`` (CLIP, SigLIP and their kin), or a text
    model,
        whose last hidden states are averaged over the tokens (or taken at the first, if ``pooling`` is
        "cls").
    tokenizer, image_processor : the model's own; the latter None for a text model.
    name : what to call it in artifacts.
    pooling : "mean" or "cls", of a text model.

    Notes
    -----
    Texts longer than the model's positions are cut. SigLIP was trained on texts padded to its full length and
    is fed such; others are padded to the longest of a batch.

    Example
    -------
    >>> encoder = load_encoder("models/clip-vit-base-patch32")
    >>> encoder.texts(["a photo of a dagger"]).shape
    (1, 512)
    """

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any, *, name: str, pooling: str = "mean"
    ) -> None:
        self.model, self.tokenizer, self.image_processor = model.eval(), tokenizer, image_processor
        self.name, self.pooling = name, pooling
        config = model.config
        self.has_images = hasattr(model, "get_image_features")
        text_config = getattr(config, "text_config", config)
        self.longest = int(getattr(text_config, "max_position_embeddings", 512))
        # RoBERTa and its kin number positions from the padding index on.
        if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "mpnet", "camembert"):
            self.longest -= int(config.pad_token_id) + 1
        self.fixed_length = "siglip" in str(getattr(config, "model_type", ""))
        self.dim = self.texts(["a"]).shape[1]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings of texts, fp32 [n, dim] of norm 1."""
        import torch

        fed = self.tokenizer(
            list(texts),
            padding="max_length" if self.fixed_length else True,
            truncation=True,
            max_length=self.longest,
            return_tensors="pt",
        ).to(self.model.device)
        with torch.inference_mode():
            if self.has_images:
                known = {key: fed[key] for key in ("input_ids", "attention_mask") if key in fed}
                return _unit(_pooled(self.model.get_text_features(**known)))
            states = self.model(**fed).last_hidden_state.float()
            if self.pooling == "cls":
                return _unit(states[:, 0])
            mask = fed["attention_mask"][:, :, None]
            return _unit((states * mask).sum(1) / mask.sum(1).clamp(min=1))

    def images(self, images: Sequence[Any]) -> np.ndarray:
        """Return the embeddings of PIL pictures, fp32 [n, dim] of norm 1."""
        import torch

        if not self.has_images:
            raise UnsupportedError(
                f"{self.name} embeds texts only; choose a CLIP or SigLIP model for pictures"
            )
        fed = self.image_processor(images=list(images), return_tensors="pt")
        with torch.inference_mode():
            values = fed["pixel_values"].to(self.model.device, self.model.dtype)
            return _unit(_pooled(self.model.get_image_features(pixel_values=values)))

    def describe(self) -> dict[str, Any]:
        """Return what the vectors depend on: name, architecture, a fingerprint of the weights, dtype,
        pooling."""
        config = self.model.config
        return {
            "name": self.name,
            "architecture": type(self.model).__name__,
            "weights": _fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "dim": self.dim,
            "images": self.has_images,
            "pooling": None if self.has_images else self.pooling,
            "model_type": getattr(config, "model_type", ""),
        }


def load_encoder(source: str | Path, *, device: str = "cpu", dtype: str = "fp32") -> HubEncoder:
    """Load an encoder from a folder or from the model hub.

    Parameters
    ----------
    source : folder or hub id of a CLIP or SigLIP model, or of a sentence embedder. Only configuration,
        safetensors and tokenizer files are read; no code of a checkpoint is run.
    device : "cpu", "cuda", …
    dtype : "fp32", "fp16" or "bf16"; CPUs are best served by fp32.

    Raises
    ------
    CheckpointError
        If it cannot be had, has no safetensors, or is another kind of model.

    Example
    -------
    >>> load_encoder("google/siglip-base-patch16-224", device="cuda", dtype="fp16").has_images
    True
    """
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if dtype not in kinds:
        raise CheckpointError(f"dtype of the embedder must be one of {', '.join(kinds)}, got {dtype!r}")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120].rstrip(".")
        raise CheckpointError(
            f"device {device!r} cannot be used ({reason}); give cpu, cuda or cuda:N"
        ) from error
    options: dict[str, Any] = {"trust_remote_code": False}
    folder = Path(source)
    if not folder.is_dir() and (folder.exists() or str(source).startswith((".", "/"))):
        raise CheckpointError(f"{source} is not a folder; give the folder or hub id of an embedder")
    try:
        model = AutoModel.from_pretrained(source, dtype=kinds[dtype], use_safetensors=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        processor = None
        if hasattr(model, "get_image_features"):
            # Pillow's arithmetic, on every machine: torchvision's gives slightly other pixels.
            processor = AutoImageProcessor.from_pretrained(source, backend="pil", **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CheckpointError(
            f"cannot load the embedder {str(source)!r} ({type(error).__name__}: {reason}); give a folder "
            "with "
            "config.json, safetensors, tokenizer and, for pictures, preprocessor_config.json"
        ) from error
    if hasattr(model, "get_image_features") != hasattr(model, "get_text_features") or not (
        hasattr(model, "get_text_features") or hasattr(model, "embeddings")
    ):
        raise CheckpointError(
            f"{source} is a {type(model).__name__}, expected a model of texts and pictures (CLIP, SigLIP) or "
            "a "
            "text encoder"
        )
    return HubEncoder(model.to(device), tokenizer, processor, name=str(source), pooling=_pooling(folder))


def _pooling(folder: Path) -> str:
    """Sentence embedders say in a file of their own how states become one vector."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    try:
        said = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}); fetch the embedder again") from error
    if said.get("pooling_mode_cls_token"):
        return "cls"
    if not said.get("pooling_mode_mean_tokens", True):
        raise UnsupportedError(f"{file} asks for a pooling other than mean and cls; choose another embedder")
    return "mean"


def _pooled(output: Any) -> Any:
    # A tensor in older versions of transformers, an output object in newer ones.
    return getattr(output, "pooler_output", output)


def _unit(vectors: Any) -> np.ndarray:
    import torch

    return torch.nn.functional.normalize(vectors.float(), dim=-1).numpy(force=True)


def _fingerprint(model: Any) -> str:
    """Sixteen digits that change with the weights: of names, shapes and a sample of each tensor."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // 64)][:64].double().numpy(force=True)
        digest.update(f"{name}{list(tensor.shape)}".encode() + sampled.tobytes())
    return digest.hexdigest()[:16]
