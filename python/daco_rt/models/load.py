"""Loading a checkpoint's Hugging Face model, for everything that is measured on it offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_model(path: Path, device: str = "auto") -> tuple[Any, Any]:
    """Load model and tokenizer of a checkpoint folder, ready for inference; no code of the folder is run.

    Parameters
    ----------
    path : the checkpoint's folder (``Checkpoint.path``).
    device : "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one.

    Returns
    -------
    (model, tokenizer)

    Example
    -------
    >>> model, tokenizer = load_model(resolve_checkpoint(None, "smol-internvl").path)
    >>> type(model).__name__
    'InternVLForConditionalGeneration'
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer, logging

    logging.disable_progress_bar()
    target = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model: Any = AutoModelForImageTextToText.from_pretrained(
        path, local_files_only=True, use_safetensors=True
    )
    return model.to(target).eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)
