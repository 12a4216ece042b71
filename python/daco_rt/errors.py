"""Errors that a user can mend. Each message is one sentence: what, expected, got, what to do.

The command line prints them without a traceback and exits with status 2; anything else that
reaches the user is a bug. Arguments of the operators raise the built-in ``TypeError`` (dtype),
``ValueError`` (shape, range) and ``NotImplementedError`` (unsupported combination) instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DacoError(Exception):
    """Base of every error that names a file, an artifact, a model or a policy."""


class ArtifactError(DacoError):
    """An artifact on disk is missing, damaged, of another version, or does not fit."""


class CheckpointError(DacoError):
    """A model checkpoint is missing, damaged, or of an unsupported kind."""


class PolicyError(DacoError, ValueError):
    """A policy, a position rule or a block list is unknown or contradictory."""


class UnsupportedError(DacoError, NotImplementedError):
    """A real feature of a model or a format that this version does not implement."""


# More names than this are a wall of text; their number says enough.
_READABLE = 20


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'? Known: a, b"`` for an unknown ``word``.

    Of more than twenty names only the nearest and their number are said.

    Example
    -------
    >>> did_you_mean("defalt", ["default", "off"])
    "; did you mean 'default'? Known: default, off"
    """
    names = sorted(known)
    if not names:
        return "; there are none"
    near = difflib.get_close_matches(word, names, n=1)
    if len(names) > _READABLE:
        return (f"; did you mean '{near[0]}'?" if near else "") + f" ({len(names)} in all)"
    return (
        f"; did you mean '{near[0]}'? Known: {', '.join(names)}" if near else f"; known: {', '.join(names)}"
    )
