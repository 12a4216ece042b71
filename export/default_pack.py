"""The pack that a built-in checkpoint is exported with when none is given."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from daco_rt.artifacts.dictionary import load_dictionary
from daco_rt.artifacts.pack import Pack
from daco_rt.dictionary import dictionary_for
from daco_rt.models import Checkpoint
from daco_rt.steering.compile import compile_pursuit_pack

# Fractions of a block's median residual norm. On smol 0.5 keeps the concept out and leaves an unrelated
# answer as it was (tests/e2e/test_smol.py). Pocket's codes are weaker: 0.3 edits a fifth of verify's rows.
_DEADBAND = {"smol-internvl": 0.5, "pocket-internvl": 0.3}


def default_pack(checkpoint: Checkpoint, path: Path, blocks: Iterable[int] | None = None) -> Pack | None:
    """Compile the shipped dictionary of a built-in checkpoint into a pack at ``path``.

    Its one policy, ``default``, removes every concept that the dictionary labels undesirable. Returns
    ``None`` for a checkpoint that has no shipped dictionary.
    """
    shipped = dictionary_for(checkpoint.label)
    if shipped is None:
        return None
    return compile_pursuit_pack(
        load_dictionary(shipped),
        path=path,
        blocks=None if blocks is None else tuple(blocks),
        deadband=_DEADBAND[checkpoint.label],
    )
