"""The pack that a built-in checkpoint is exported with when none is given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from daco_rt.artifacts.dictionary import load_dictionary
from daco_rt.artifacts.pack import Pack
from daco_rt.dictionary import dictionary_for
from daco_rt.models import Checkpoint
from daco_rt.steering.compile import DEFAULT_POLICIES, compile_pursuit_pack

# Deadbands are fractions of a block's median residual norm. On smol 0.5 keeps the concept out and leaves an
# unrelated answer as it was (tests/e2e/test_smol.py). Pocket's codes are weaker: 0.3 edits a fifth of
# verify's rows. On scenes one block is enough: where the model is about to name a thing (docs/scenes.md).
_OPTIONS: dict[str, dict[str, Any]] = {
    "smol-internvl": {"deadband": 0.5},
    "scenes-internvl": {"deadband": 0.1, "gamma": 0.2, "k": 4, "blocks": (3,)},
    "pocket-internvl": {"deadband": 0.3},
}
_POLICIES = {"scenes-internvl": (replace(DEFAULT_POLICIES[0], positions="generated"),)}


def default_pack(checkpoint: Checkpoint, path: Path, blocks: Iterable[int] | None = None) -> Pack | None:
    """Compile the shipped dictionary of a built-in checkpoint into a pack at ``path``.

    Its one policy, ``default``, removes every concept that the dictionary labels undesirable. Returns
    ``None`` for a checkpoint that has no shipped dictionary.
    """
    shipped = dictionary_for(checkpoint.label)
    if shipped is None:
        return None
    options = dict(_OPTIONS[checkpoint.label])
    if blocks is not None:
        options["blocks"] = tuple(blocks)
    policies = _POLICIES.get(checkpoint.label, DEFAULT_POLICIES)
    return compile_pursuit_pack(load_dictionary(shipped), path=path, policies=policies, **options)
