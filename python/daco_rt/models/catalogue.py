"""The checkpoints that come with the package, for ``daco-rt models list`` and ``daco-rt models get NAME``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from daco_rt.errors import CheckpointError, did_you_mean
from daco_rt.models import pocket, scenes, smol
from daco_rt.models.assembly import model_folder

_BUILTIN = {smol.NAME: smol, scenes.NAME: scenes, pocket.NAME: pocket}


@dataclass(frozen=True)
class BuiltinModel:
    """One built-in checkpoint; ``path`` is None as long as it is not built."""

    name: str
    description: str
    licence: str
    path: Path | None

    @property
    def state(self) -> str:
        """The folder, or ``"not built"``."""
        return "not built" if self.path is None else str(self.path)


def models_available() -> tuple[BuiltinModel, ...]:
    """Return the built-in checkpoints; nothing is built or fetched.

    Example
    -------
    >>> [model.name for model in models_available()]
    ['smol-internvl', 'scenes-internvl', 'pocket-internvl']
    """
    return tuple(
        BuiltinModel(
            name, module.DESCRIPTION, module.LICENCE, model_folder(name) if module.is_built() else None
        )
        for name, module in _BUILTIN.items()
    )


def is_builtin(name: str) -> bool:
    """Whether ``name`` is a built-in checkpoint."""
    return name in _BUILTIN


def ensure(name: str, *, progress: bool = True) -> Path:
    """Return the folder of a built-in checkpoint, building it first where needed.

    Raises
    ------
    CheckpointError
        If the name is unknown, or the checkpoint cannot be built.

    Example
    -------
    >>> ensure("pocket-internvl", progress=False).name
    'pocket-internvl'
    """
    if name not in _BUILTIN:
        raise CheckpointError(f"no built-in model is called {name!r}{did_you_mean(name, _BUILTIN)}")
    return _BUILTIN[name].ensure(name, progress=progress)
