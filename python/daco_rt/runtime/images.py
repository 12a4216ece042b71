"""Opening pictures, with one clear sentence for a file that is none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, Union

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
    return read_image(path, str(path))


def read_image(file: Path | BinaryIO, name: str, *, background: str | None = None) -> Any:
    """Return the picture in a file, or in a binary stream, as an upright RGB PIL image.

    Parameters
    ----------
    file : a path, or an open binary file.
    name : what to call it in a complaint.
    background : colour behind transparent pixels ("white"); by default their hidden colour shows, as the
        processors of transformers have it.

    Raises
    ------
    DacoError
        If it is missing or no picture that Pillow can read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if background is not None and upright.has_transparency_data:
                upright = upright.convert("RGBA")
                behind = Image.new("RGBA", upright.size, background)
                upright = Image.alpha_composite(behind, upright)
            return upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        if isinstance(e, FileNotFoundError | IsADirectoryError):
            raise DacoError(f"{name} is not a file: the image to read was not found there") from e
        reason = str(e) if not isinstance(e, Image.UnidentifiedImageError) else "unknown format"
        raise DacoError(f"{name} is not an image that Pillow can read: {reason}") from e


def _short(source: str | Path) -> str:
    text = str(source)
    return text if len(text) <= 60 else text[:57] + "..."
