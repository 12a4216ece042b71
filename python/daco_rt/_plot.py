"""What every figure shares: one style, fit for print at column width, and saving that explains itself."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daco_rt._files import atomic_file
from daco_rt.errors import DacoError

# Okabe and Ito's colours, which the common kinds of colour blindness keep apart; black is left for text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#F0E442")
# Equal figures give equal bytes.
_UNDATED: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.0,
    "svg.fonttype": "none",
}


@contextmanager
def new_figure(output: str | Path, *, width: float = 5.5, height: float = 3.4) -> Iterator[Any]:
    """Yield an empty matplotlib figure; when the block ends without an error it is written to ``output``.

    Parameters
    ----------
    output : its ending decides the format: png (160 dots an inch), svg or pdf. An old file is replaced.
    width, height : inches; at 5.5 the fonts are 9 points and more in a text column of that width.

    Raises
    ------
    DacoError
        If matplotlib is not installed, the format is unknown, or the device refuses the file.

    Example
    -------
    >>> with new_figure("line.png") as figure:
    ...     figure.add_subplot().plot([1, 2, 3])
    """
    output = Path(output)
    kind = output.suffix.lstrip(".").lower()
    if kind not in _UNDATED:
        raise DacoError(f"{output}: the format '{kind}' is unknown; use .png, .svg or .pdf")
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
        yield figure
        output.parent.mkdir(parents=True, exist_ok=True)
        # matplotlib seeks in what it writes, which a file that is hashed on the way does not allow.
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, metadata=_UNDATED[kind])
        with atomic_file(output) as file:
            file.write(drawn.getvalue())


def require_matplotlib() -> None:
    """Raise ``DacoError`` if matplotlib is not installed. Call it before work whose end is a figure."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DacoError("matplotlib is not installed; pip install 'daco-rt[figures]'")
