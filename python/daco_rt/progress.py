"""One progress bar for everything that takes more than a second or two.

Bars go to standard error and only to a terminal, so that output stays fit for pipes; elsewhere one
line says what began.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(
    title: str, total: int | None = None, *, unit: str = "", shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show progress while the block runs; yields ``advance(n)``.

    Parameters
    ----------
    title : str
        What is being done, in a few words.
    total : int, optional
        Number of steps, or of bytes with ``unit="bytes"``; unknown totals pulse.
    unit : str
        ``"bytes"`` shows sizes and rates; anything else counts steps, with its rate if it has a name.
    shown : bool
        False shows nothing, for callers whose own caller wants silence.

    Example
    -------
    >>> with progress("hashing", total=3) as advance:
    ...     for _ in range(3):
    ...         advance(1)
    """
    if not shown:
        yield lambda n: None
        return
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
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> str:  # type: ignore[override]
            return f"{task.speed:,.0f} {unit}/s" if unit and task.speed else ""

    if unit == "bytes":
        amount: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
    else:
        amount = (MofNCompleteColumn(), RateColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)
