"""Fetching a checkpoint from a model hub: configuration, tokenizer and safetensors files, never code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from daco_rt.errors import CheckpointError

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_SKIP = ["*/*"]  # other formats and the originals' code live in subfolders


def download(
    identifier: str, check: Callable[[Mapping[str, Any]], object], *, local_only: bool = False
) -> Path:
    """Return the local folder of the hub repository ``identifier`` ("owner/name", or "owner/name@revision").

    ``check`` sees config.json before anything large is fetched, and raises if the model is not supported.
    With ``local_only`` only what was downloaded before is used.

    Raises ``CheckpointError`` in one sentence when the hub cannot be reached or has no such repository.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    name, _, revision = identifier.partition("@")
    options: dict[str, Any] = {"revision": revision or None, "local_files_only": local_only}
    try:
        config = json.loads(Path(hf_hub_download(name, "config.json", **options)).read_text("utf-8"))
        check(config)
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_SKIP, **options))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(
            f"cannot get {identifier!r} from the model hub ({type(error).__name__}: {reason[:160]});"
            " download it on a machine that can reach the hub and pass the folder with --checkpoint"
        ) from error
