"""The dictionaries that come with the package, by the checkpoint that they were measured on."""

from __future__ import annotations

from pathlib import Path

_DATA = Path(__file__).resolve().parent.parent / "data"
_FOLDERS = {
    "smol-internvl": "smol-concepts",
    "scenes-internvl": "scenes-concepts",
    "pocket-internvl": "pocket-concepts",
}


def dictionary_for(label: str) -> Path | None:
    """Return the folder of the dictionary made for a built-in checkpoint, or None if there is none.

    Parameters
    ----------
    label : str
        A checkpoint's label, such as ``"smol-internvl"``.

    Example
    -------
    >>> dictionary_for("pocket-internvl").name
    'pocket-concepts'
    >>> dictionary_for("/models/mine") is None
    True
    """
    folder = _DATA / _FOLDERS[label] if label in _FOLDERS else None
    return folder if folder is not None and (folder / "manifest.json").is_file() else None


def shipped_dictionaries() -> dict[str, Path]:
    """Return every shipped dictionary by the label of its checkpoint."""
    found = {label: dictionary_for(label) for label in _FOLDERS}
    return {label: path for label, path in found.items() if path is not None}
