"""pyarrow, loaded where it is first needed; it comes with the extra ``corpus``."""

from __future__ import annotations

from typing import Any

from daco_rt.errors import DacoError


def arrow() -> Any:
    """Return the module ``pyarrow``, with ``parquet`` and ``compute`` loaded.

    Raises
    ------
    DacoError
        If it is not installed; the sentence names the extra.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise DacoError(
            "Parquet files need pyarrow, which is not installed; install it with: "
            "pip install 'daco-rt[corpus]'"
        ) from error
    return pyarrow
