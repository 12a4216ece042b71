"""A checkpoint as the torch model of transformers, for what is measured on it; serving never needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from daco_rt.errors import DacoError

if TYPE_CHECKING:
    import torch


def torch_device(device: str | torch.device) -> torch.device:
    """Return the torch device of a name; "auto" is a GPU if torch finds one.

    Raises
    ------
    DacoError
        If the name is unknown, or there is no such GPU.

    Example
    -------
    >>> torch_device("cpu")
    device(type='cpu')
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise DacoError(f"device {device!r} is unknown; give cpu, cuda, cuda:1 or auto") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DacoError(f"device {device!r}: torch finds no GPU here; give cpu or auto")
    return target


def load_torch(path: str | Path, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Load a local checkpoint for reading its activations; return the model in evaluation mode and its
    tokenizer.

    Parameters
    ----------
    path : the folder of a Hugging Face image-text checkpoint with safetensors weights.
    device : "cpu", "cuda", "cuda:1" or "auto".
    dtype : "fp32", "bf16", "fp16" or "auto", the checkpoint's own.

    Raises
    ------
    DacoError
        If the device is not there.

    Example
    -------
    >>> model, tokenizer = load_torch(resolve_checkpoint("internvl", "smol").path)
    """
    target = torch_device(device)
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer, logging

    logging.disable_progress_bar()
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": "auto"}
    model: Any = AutoModelForImageTextToText.from_pretrained(
        path, local_files_only=True, use_safetensors=True, dtype=kinds[dtype]
    )
    return model.to(target).eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)
