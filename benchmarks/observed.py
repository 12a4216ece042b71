"""Codes as the operators report them in observe mode: slot 1, whose policy changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from daco_rt.ops.reference import Steered


def observing(rows: int, atoms: int, dim: int) -> dict[str, NDArray[Any]]:
    """Return the operands that observe so many rows and count every atom as undesirable."""
    return {
        "slots": np.ones(rows, np.int32),
        "gain": np.ones((2, atoms), np.float32),
        "undesirable": np.ones((2, atoms), bool),
        "shift": np.zeros((2, dim), np.float32),
        "limits": np.zeros((2, 4), np.float32),
    }


def codes_of(found: Steered, atoms: int) -> NDArray[np.float32]:
    """Return the reported support as codes [rows, atoms]."""
    codes = np.zeros((len(found.support_index), atoms), np.float32)
    row, place = np.nonzero(found.support_index >= 0)
    codes[row, found.support_index[row, place]] = found.support_value[row, place]
    return codes
