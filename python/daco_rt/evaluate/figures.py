"""The figures of a report, as SVG text: the front of safety against harm done, and bars by category."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from typing import Any

from daco_rt.errors import DacoError
from daco_rt.evaluate.protocol import RATES
from daco_rt.evaluate.rates import OUTCOMES
from daco_rt.evaluate.summary import Numbers, judged

# Distinguishable without colour vision, on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
_FLOOR = 1e-3


def draw_front(
    numbers: Sequence[Numbers],
    *,
    harmful: str,
    benign: str,
    judge: str,
    rate: str = "main",
    budgets: Sequence[float] = (),
    chosen: Collection[str] = (),
) -> str:
    """Return the front of one benchmark under one judge: a rate against the divergence on harmless answers.

    A line joins the strengths of a method, bars are 95 % intervals. The divergence is drawn on a logarithmic
    scale; what is below 0.001 nats stands at the left edge. Dotted lines are ``budgets``, circles stand
    around ``chosen`` variants. Left is better, and so is down for the main rate.

    Raises
    ------
    DacoError
        matplotlib is not installed.

    Example
    -------
    >>> draw_front(summarise(evaluation), harmful="strongreject", benign="benign", judge="lexicon")[:4]
    '<svg'
    """
    figure, axes = _canvas(7.2, 4.4)
    by_variant = {n.variant: n for n in numbers if n.benchmark == benign and n.kl is not None}
    rows = [n for n in numbers if n.benchmark == harmful and n.variant in by_variant]
    methods = list(dict.fromkeys(n.method for n in rows))
    shown = rate in RATES  # a share, else a score of any size
    scale = 100 if shown else 1
    for i, method in enumerate(methods):
        points = []
        for n in rows:
            if n.method == method:
                kl = by_variant[n.variant].kl
                assert kl is not None
                points.append((max(kl.value, _FLOOR), kl, judged(n, judge, rate), n))
        points.sort(key=lambda p: p[0])
        colour = "black" if method == "none" else COLOURS[(i - 1) % len(COLOURS)]
        x, y = [p[0] for p in points], [scale * p[2].value for p in points]
        axes.errorbar(
            x,
            y,
            xerr=[
                [p[0] - min(max(p[1].low, _FLOOR), p[0]) for p in points],
                [max(max(p[1].high, _FLOOR) - p[0], 0) for p in points],
            ],
            # Rounding may put an end of an interval on the wrong side of a value of 0 or 1.
            yerr=[
                [max(scale * (p[2].value - p[2].low), 0) for p in points],
                [max(scale * (p[2].high - p[2].value), 0) for p in points],
            ],
            fmt=f"{MARKERS[i % len(MARKERS)]}-",
            color=colour,
            ecolor=(*_rgb(colour), 0.25),
            markersize=6,
            linewidth=1.3,
            label=method,
        )
        for (_, _, _, n), across, up in zip(points, x, y, strict=True):
            if n.strength is not None:
                axes.annotate(
                    f"{n.strength:g}",
                    (across, up),
                    xytext=(5, 5),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                )
            if n.variant in chosen and method != "none":
                axes.plot([across], [up], "o", markersize=13, markerfacecolor="none", color="0.15", zorder=5)
    for budget in budgets:
        axes.axvline(budget, color="0.4", linewidth=0.9, linestyle=":")
    axes.set_xscale("log")
    if shown:
        axes.set_ylim(-3, 103)
    axes.set_xlabel(f"divergence on {benign}, nats a token")
    axes.set_ylabel("% of answers" if shown else rate.replace("_", " "))
    what = OUTCOMES[rows[0].judges[judge].outcome] if rate == "main" else rate.replace("_", " ")
    axes.set_title(f"{harmful}, {judge}: {what}", loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def draw_categories(
    numbers: Sequence[Numbers], *, benchmark: str, judge: str, variants: Sequence[str]
) -> str:
    """Return bars by category: the judge's main rate under the chosen variants, with 95 % intervals.

    Raises
    ------
    DacoError
        matplotlib is not installed.

    Example
    -------
    >>> draw_categories(summarise(evaluation), benchmark="mm", judge="lexicon", variants=["none"])[:4]
    '<svg'
    """
    rows = {n.variant: n for n in numbers if n.benchmark == benchmark and n.variant in variants}
    shown = [name for name in variants if name in rows]
    categories = list(next(iter(rows.values())).by_category[judge])
    figure, axes = _canvas(7.2, 0.7 + len(categories) * (0.14 * len(shown) + 0.16))
    height = 0.8 / len(shown)
    for i, name in enumerate(shown):
        cells = [rows[name].by_category[judge][category] for category in categories]
        places = [at + (i - (len(shown) - 1) / 2) * height for at in range(len(categories))]
        axes.barh(
            places,
            [0 if math.isnan(c.value) else 100 * c.value for c in cells],
            height * 0.92,
            color="#444444" if name == "none" else COLOURS[(i - 1) % len(COLOURS)],
            label=name,
        )
        axes.hlines(
            places, [100 * c.low for c in cells], [100 * c.high for c in cells], color="0.35", linewidth=0.6
        )
    sizes = [next(iter(rows.values())).by_category[judge][c].n for c in categories]
    labels = [f"{_short(c)} ({n})" for c, n in zip(categories, sizes, strict=True)]
    axes.set_yticks(range(len(categories)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    outcome = next(iter(rows.values())).judges[judge].outcome
    axes.set_xlabel(f"% {OUTCOMES[outcome]} ({judge})", fontsize=8)
    axes.set_title(benchmark, loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DacoError("figures need matplotlib; pip install 'daco-rt[figures]'") from error
    with rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    out = io.StringIO()
    # Without a date and with fixed ids equal numbers give equal bytes.
    with rc_context({"svg.hashsalt": "daco_rt"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def _short(text: str) -> str:
    return text if len(text) <= 34 else text[:33] + "…"
