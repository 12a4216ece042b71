"""Values of a configuration, each checked with a sentence that says where it stands, and values as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from daco_rt.errors import DacoError


def plain(value: Any) -> Any:
    """Return a value as JSON has it: no tuples, and null where a number is NaN or infinite.

    Example
    -------
    >>> plain({"low": math.nan, "n": (1, 2.5)})
    {'low': None, 'n': [1, 2.5]}
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def safe_name(name: Any, where: str) -> str:
    """A name that can stand in a file's path."""
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise DacoError(f"{where}: a name must be of letters, digits, '-', '_' and '.'; rename it")
    return name


def text(value: Any, where: str) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise DacoError(f"{where} must be text, got {value!r}")
    return value


def flag(value: Any, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise DacoError(f"{where} must be true or false, got {value!r}")
    return value


def count(value: Any, where: str) -> int:
    """An integer from 1."""
    if type(value) is not int or value < 1:
        raise DacoError(f"{where} must be an integer from 1, got {value!r}")
    return value


def number(value: Any, where: str, least: float = -math.inf) -> float:
    """A finite number of ``least`` or more, as a float."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < least
    ):
        at_least = "" if least == -math.inf else f" of {least:g} or more"
        raise DacoError(f"{where} must be a number{at_least}, got {value!r}")
    return float(value)
