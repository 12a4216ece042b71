"""One progress bar for everything that takes more than a second or two.

Bars go to standard error and only to a terminal, so that output stays fit for pipes; elsewhere a line
says what began, and from then on a line a minute how far it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds between lines where there is no terminal.
LINE_EVERY = 60.0


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
        ``"bytes"`` shows sizes and rates, any other name counts steps and shows how many a second;
        without one there is no rate.
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
        yield _lines(title, total, unit)
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

    class Rate(ProgressColumn):
        def render(self, task: Task) -> str:
            return f"{_number(task.speed)} {unit}/s" if unit and task.speed else ""

    counted = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), Rate())
    columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn())
    # The rate of the last minute: batches differ in length, so that of the last few steps jumps.
    with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=60.0) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)


def _lines(title: str, total: int | None, unit: str) -> Callable[[int], None]:
    began = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < LINE_EVERY or not done:
            return
        last = now
        rate = done / (now - began)
        line = f"{title}: {done:,}" + (f" of {total:,} {unit}" if total else f" {unit}")
        line = f"{line.rstrip()}, {_number(rate)} a second"
        if total:
            line += f", {_duration((total - done) / rate)} left"
        print(line, file=sys.stderr, flush=True)

    return advance


def _number(value: float | None) -> str:
    value = value or 0.0
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _duration(seconds: float) -> str:
    minutes = max(0, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
