"""The figure of a sweep: safety against capability, one line for each η."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daco_rt._plot import new_figure
from daco_rt.errors import DacoError
from daco_rt.sae.sweep import SweepPoint, choose_point, pareto_front


def draw_sweep(
    points: Sequence[SweepPoint], output: str | Path, *, keep_capability: float = 0.95, title: str = ""
) -> Path:
    """Draw safety against capability and return the file; its ending decides the format (png, svg, pdf).

    Up and right is better. A line joins the γ of one η, the dashed line is the front that nothing beats, the
    ring marks the point that ``choose_point`` takes, the grey band what it refuses.

    Raises
    ------
    DacoError
        If matplotlib is not installed or there is no point.

    Example
    -------
    >>> draw_sweep(points, "sweep.png")
    PosixPath('sweep.png')
    """
    if not points:
        raise DacoError("the sweep has no points to draw")
    with new_figure(output, width=7.2, height=4.8) as figure:
        _draw(figure.add_subplot(), points, keep_capability, title)
    return Path(output)


def _draw(axes: Any, points: Sequence[SweepPoint], keep_capability: float, title: str) -> None:
    free = next(point for point in points if point.eta is None)
    chosen = choose_point(points, keep_capability=keep_capability)
    steered = [point for point in points if point.eta is not None]
    etas = sorted({point.eta for point in steered if point.eta is not None})
    for i, eta in enumerate(etas):
        line = sorted((p for p in steered if p.eta == eta), key=lambda p: p.gamma)
        colour = (0.1 + 0.8 * i / max(1, len(etas) - 1), 0.35, 0.9 - 0.8 * i / max(1, len(etas) - 1))
        axes.plot(
            [p.capability for p in line], [p.safety for p in line], "o-", color=colour, markersize=5,
            linewidth=1.2, label=f"η = {eta:g} ({line[0].undesirable} undesirable)",
        )  # fmt: skip
        for point in (line[0], line[-1]) if len(line) > 1 else line:
            axes.annotate(
                f"γ {point.gamma:g}", (point.capability, point.safety), xytext=(4, 4),
                textcoords="offset points", color="0.3",
            )  # fmt: skip
    front = pareto_front(points)
    axes.plot(
        [p.capability for p in front], [p.safety for p in front], "--", color="0.5", linewidth=1, zorder=0,
        label="front",
    )  # fmt: skip
    axes.plot([free.capability], [free.safety], "s", color="black", markersize=6, label="not steered")
    axes.plot(
        [chosen.capability], [chosen.safety], "o", markersize=13, markerfacecolor="none",
        markeredgecolor="black", label="chosen",
    )  # fmt: skip
    left, right = axes.get_xlim()
    axes.axvspan(left, keep_capability * free.capability, color="0.93", zorder=-1)
    axes.set_xlim(left, right)
    axes.set_xlabel("capability (higher is better)")
    axes.set_ylabel("safety (higher is better)")
    if title:
        axes.set_title(title)
    axes.legend()
