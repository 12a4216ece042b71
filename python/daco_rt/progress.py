"""One progress bar for everything that takes more than a second or two.

Bars go to standard error and only to a terminal, so that output stays fit for pipes; elsewhere one
line says what began.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str, total: int | None = None, *, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Show progress while the block runs; yields ``advance(n)``.

    Parameters
    ----------
    title : str
        What is being done, in a few words.
    total : int, optional
        Number of steps, or of bytes with ``unit="bytes"``; unknown totals pulse.
    unit : str
        ``"bytes"`` shows sizes and rates; anything else counts steps.

    Example
    -------
    >>> with progress("hashing", total=3) as advance:
    ...     for _ in range(3):
    ...         advance(1)
    """
    if not sys.stderr.isatty():
        print(f"{title} …", file=sys.stderr, flush=True)
        yield lambda n: None
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)
