"""Rows of an embedding table, looked up straight from the file they are stored in.

The graph takes embeddings, not tokens, because image embeddings stand between them. The table (often a third
of a small model) is never loaded: the rows that a prompt needs are read from the mapped file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from daco_rt.artifacts.tensors import DTYPES, TensorRef
from daco_rt.errors import CheckpointError

_DTYPES = {"fp32": DTYPES["F32"], "fp16": DTYPES["F16"], "bf16": DTYPES["BF16"]}


class TokenEmbedding:
    """Embedding table [V, d] inside a file, memory-mapped.

    Parameters
    ----------
    file, offset, shape, dtype : where the table lies; ``dtype`` is ``"F32"``, ``"F16"`` or ``"BF16"``.

    Raises ``CheckpointError`` if the file is too short or the table is not a matrix of a known dtype.

    Example
    -------
    >>> table = TokenEmbedding(Path("model.safetensors"), 4096, (151936, 896), "BF16")
    >>> table.lookup([[1, 2, 3]]).shape
    (1, 3, 896)
    """

    def __init__(self, file: Path, offset: int, shape: Sequence[int], dtype: str) -> None:
        if len(shape) != 2 or dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"{file}: the embedding table must be a matrix of F32, F16 or BF16, got {dtype} {list(shape)}"
            )
        rows, width = int(shape[0]), int(shape[1])
        nbytes = rows * width * DTYPES[dtype].itemsize
        ref = TensorRef(Path(file), "embed_tokens.weight", dtype, (rows, width), offset, nbytes)
        self._table = ref.read()
        self.rows, self.width = rows, width

    def lookup(self, ids: np.ndarray | Sequence, *, dtype: str = "fp32") -> np.ndarray:
        """Return embeddings [..., d] in ``"fp32"``, ``"fp16"`` or ``"bf16"`` for integer token ids [...].

        Raises ``ValueError`` for ids outside 0…V−1, ``TypeError`` for ids that are not integers.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        tokens = np.asarray(ids)
        if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
            raise TypeError(f"token ids must be integers, got {tokens.dtype}")
        tokens = tokens.astype(np.int64)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.rows):
            raise ValueError(
                f"token ids must lie in 0…{self.rows - 1}, got {int(tokens.min())}…{int(tokens.max())};"
                " the tokenizer belongs to another model"
            )
        return self._table[tokens].astype(_DTYPES[dtype])
