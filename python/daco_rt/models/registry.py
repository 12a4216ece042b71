"""Names that load their object when asked, and the model families registered under them.

A family is one file and one line here: the Hugging Face architecture string of its checkpoints and where its
:class:`~daco_rt.models.family.FamilySpec` stands, as ``"module:attribute"``. Nothing is imported before it is
looked up.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from daco_rt.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    from daco_rt.models.checkpoint import Checkpoint
    from daco_rt.models.family import FamilySpec

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of names whose values are loaded on first use.

    Example
    -------
    >>> tools: Registry[type] = Registry("tool")
    >>> tools.register("ordered", "collections:OrderedDict")
    >>> tools["ordered"].__name__
    'OrderedDict'
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._places: dict[str, str] = {}
        self._loaded: dict[str, T] = {}

    def register(self, name: str, place: str) -> None:
        """Add ``name`` → ``"module:attribute"``; raises ``ValueError`` if the name has another place."""
        if place.count(":") != 1:
            raise ValueError(f"{self._what} {name!r}: place must read 'module:attribute', got {place!r}")
        if self._places.setdefault(name, place) != place:
            raise ValueError(
                f"{self._what} {name!r} is already registered as {self._places[name]!r}, cannot add {place!r}"
            )

    def __getitem__(self, name: str) -> T:
        """Load and return the object; raises ``CheckpointError`` with near matches for an unknown name."""
        if name not in self._places:
            raise CheckpointError(f"unknown {self._what} {name!r}{did_you_mean(name, self._places)}")
        if name not in self._loaded:
            module, attribute = self._places[name].split(":")
            self._loaded[name] = getattr(importlib.import_module(module), attribute)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._places))

    def __len__(self) -> int:
        return len(self._places)


ARCHITECTURES: Registry[FamilySpec] = Registry("architecture")
ARCHITECTURES.register("InternVLForConditionalGeneration", "daco_rt.models.internvl:INTERNVL")


def families() -> dict[str, FamilySpec]:
    """Return every family by its name, sorted: ``{"internvl": FamilySpec(...), ...}``."""
    found: dict[str, FamilySpec] = {}
    for architecture in ARCHITECTURES:
        spec = ARCHITECTURES[architecture]
        if found.setdefault(spec.name, spec) is not spec:
            raise ValueError(f"two families are called {spec.name!r}")
    return dict(sorted(found.items()))


def family(name: str) -> FamilySpec:
    """Return the family called ``name``; raises ``CheckpointError`` with near matches for an unknown one."""
    known = families()
    if name not in known:
        raise CheckpointError(f"unknown model {name!r}{did_you_mean(name, known)}")
    return known[name]


def family_of(checkpoint: Checkpoint) -> FamilySpec:
    """Return the family whose architecture ``checkpoint.config`` names.

    Raises ``CheckpointError`` listing what is supported when no family knows it.
    """
    return ARCHITECTURES[architecture_of(checkpoint.config, str(checkpoint.path))]


def architecture_of(config: Mapping[str, Any], where: str) -> str:
    """Return the first entry of a ``config.json``'s ``architectures``; ``where`` names the file in errors."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"{where}: config.json has no 'architectures', so it is no Hugging Face model; expected one of"
            f" {', '.join(ARCHITECTURES)}"
        )
    return names[0]
