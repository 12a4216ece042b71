"""Opening pictures, with one clear sentence for a file that is none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from daco_rt.errors import DacoError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = Union[str, Path, np.ndarray, "Image"]
"""A path, a PIL image, or a uint8 array [H, W, 3] (or [H, W])."""


def open_image(source: ImageSource) -> Any:
    """Return ``source`` as an RGB PIL image, turned upright as its EXIF tag says.

    Raises
    ------
    DacoError
        The file is missing or is no image, or an array has the wrong shape or dtype.

    Example
    -------
    >>> open_image(np.zeros((4, 6, 3), np.uint8)).size
    (6, 4)
    """
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source).convert("RGB")
    if isinstance(source, np.ndarray):
        shaped = source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)
        if source.dtype != np.uint8 or not shaped or source.size == 0:
            raise DacoError(
                "an image array must be uint8 with shape [H, W, 3] or [H, W], "
                f"got {source.dtype} {list(source.shape)}"
            )
        return Image.fromarray(source).convert("RGB")
    if not isinstance(source, str | Path):
        raise DacoError(f"an image must be a path, a PIL image or an array, got {type(source).__name__}")
    if str(source).startswith(("http://", "https://", "data:")):
        raise DacoError(
            f"{_short(source)} is an address: images are read from local files only; download it first"
        )
    path = Path(source)
    if not path.is_file():
        raise DacoError(f"{path} is not a file: the image to read was not found there")
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        reason = str(e) if not isinstance(e, Image.UnidentifiedImageError) else "unknown format"
        raise DacoError(f"{path} is not an image that Pillow can read: {reason}") from e


def _short(source: str | Path) -> str:
    text = str(source)
    return text if len(text) <= 60 else text[:57] + "..."
