"""The pack that a built-in checkpoint is exported with when none is given."""

from __future__ import annotations

from pathlib import Path

from daco_rt.artifacts.dictionary import load_dictionary
from daco_rt.artifacts.pack import Pack
from daco_rt.dictionary import dictionary_for
from daco_rt.models import Checkpoint
from daco_rt.steering.compile import compile_pursuit_pack


def default_pack(checkpoint: Checkpoint, path: Path) -> Pack | None:
    """Compile the shipped dictionary of a built-in checkpoint into a pack at ``path``.

    Its one policy, ``default``, removes every concept that the dictionary labels undesirable. Returns
    ``None`` for a checkpoint that has no shipped dictionary.
    """
    shipped = dictionary_for(checkpoint.label)
    if shipped is None:
        return None
    return compile_pursuit_pack(load_dictionary(shipped), path=path)
