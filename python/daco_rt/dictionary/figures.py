"""Figures of a dictionary's diagnostics, drawn from the JSON of ``report.diagnose`` and nothing else.

Each title says what is to be seen, worked out from the numbers drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt._plot import COLOURS, new_figure
from daco_rt.concepts.held_out import ALONE, ASKED, WITHOUT_WORD

Report = Mapping[str, Any]
# As many as there are colours beside grey that show on white.
_SHOWN_GROUPS = 6
AT_WORD = "at the word of an unseen sentence"


def write_figures(report: Report, folder: str | Path, *, kind: str = "png") -> tuple[Path, ...]:
    """Draw every figure that the report has numbers for into a folder, and return the files.

    ``coherence``, ``groups`` and ``map`` always; ``signal`` if the means were given, ``identification`` if
    texts were held out. Old files of these names are replaced.

    Raises
    ------
    DacoError
        If matplotlib is not installed or ``kind`` is none of png, svg, pdf.

    Example
    -------
    >>> [path.name for path in write_figures(report, "figures")]
    ['coherence.png', 'groups.png', 'map.png', 'signal.png', 'identification.png']
    """
    folder = Path(folder)
    drawn = []
    for name, draw in (
        ("coherence", draw_coherence),
        ("groups", draw_groups),
        ("map", draw_map),
        ("signal", draw_signal),
        ("identification", draw_identification),
    ):
        if report.get("groups" if name == "map" else name):
            output = folder / f"{name}.{kind}"
            draw(report, output)
            drawn.append(output)
    return tuple(drawn)


def draw_coherence(report: Report, output: str | Path) -> None:
    """Draw quantiles of |cos| between atoms by block, and the histogram at one block against random atoms."""
    by_block = report["coherence"]
    blocks = sorted(map(int, by_block))
    shown = str(report["block"])
    dim = report["dim"]
    with new_figure(output, width=6.4, height=3.0) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        shares = (("0.5", "median"), ("0.99", "99 %"), ("0.999", "99.9 %"))
        for colour, (share, name) in zip(COLOURS, shares, strict=False):
            values = [by_block[str(block)]["quantiles"][share] for block in blocks]
            left.plot(blocks, values, "o-", color=colour)
            left.annotate(
                name,
                (blocks[-1], values[-1]),
                xytext=(5, 0),
                textcoords="offset points",
                color=colour,
                va="center",
            )
        left.axhline(_random_quantile(0.5, dim), color="0.5", linestyle=":")
        left.annotate(
            "median, random atoms", (blocks[0], _random_quantile(0.5, dim)), xytext=(0, -3),
            textcoords="offset points", va="top", color="0.4",
        )  # fmt: skip
        _block_axis(left, blocks)
        left.margins(x=0.05)
        left.set_xlim(right=blocks[-1] + 0.25 * (blocks[-1] - blocks[0] + 1))
        left.set_ylim(-0.08, 1)
        left.set_ylabel("|cos| between two atoms")
        middle = max(by_block[str(block)]["quantiles"]["0.5"] for block in blocks)
        left.set_title(f"Half of all pairs: |cos| below {middle:.2f}")
        counts = np.array(by_block[shown]["histogram"], np.float64)
        edges = np.linspace(0, 1, len(counts) + 1)
        density = counts / counts.sum() * 100
        right.stairs(density, edges, fill=True, color=COLOURS[0], alpha=0.85)
        chance = np.diff([_random_below(edge, dim) for edge in edges]) * 100
        right.stairs(chance, edges, color="0.3", linewidth=1.2, label="random atoms")
        right.legend(loc="upper right")
        right.set_yscale("log")
        smallest = density[density > 0].min()
        right.set_ylim(smallest / 2, max(density.max(), chance.max()) * 3)
        right.set_xlabel("|cos|")
        right.set_ylabel("% of pairs in a bin")
        right.set_title(f"Every pair at block {shown}: up to {by_block[shown]['maximum']:.2f}")


def draw_groups(report: Report, output: str | Path) -> None:
    """Draw the mean cosine between the atoms of two groups as a matrix."""
    groups = report["groups"]
    names, cosines = groups["names"], np.array(groups["cosines"], np.float64)
    inside = np.diag(cosines)
    outside = cosines[~np.eye(len(names), dtype=bool)]
    bound = float(np.nanmax(np.abs(cosines)))
    with new_figure(output, width=6.4, height=5.4) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(cosines, cmap="RdBu_r", vmin=-bound, vmax=bound)
        sizes = groups["sizes"]
        axes.set_yticks(
            range(len(names)), [f"{name} ({size})" for name, size in zip(names, sizes, strict=True)]
        )
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, shrink=0.85, label="mean cosine between atoms")
        figure.suptitle(
            f"Mean cosine {np.nanmean(inside):.2f} within a group, {np.nanmean(outside):.2f} between groups\n"
            f"(block {report['block']}; number of concepts in parentheses)",
            x=0.01, ha="left", fontsize=10,
        )  # fmt: skip


def draw_map(report: Report, output: str | Path) -> None:
    """Draw the atoms of the labelled groups on the plane along which the groups' means differ most."""
    groups = report["groups"]
    places = {name: np.array(place, np.float64) for name, place in groups["map"].items()}
    middles = {name: np.median(place, axis=0) for name, place in places.items()}
    shown = _far_apart(middles, min(_SHOWN_GROUPS, len(middles)))
    with new_figure(output, width=6.4, height=5.0) as figure:
        axes = figure.add_subplot()
        for name in places.keys() - set(shown):
            axes.plot(*places[name].T, ".", color="0.82", markersize=4, zorder=1)
        for colour, name in zip(COLOURS, shown, strict=False):
            axes.plot(*places[name].T, ".", color=colour, markersize=6, alpha=0.8, zorder=2)
        for colour, name in zip(COLOURS, shown, strict=False):
            axes.text(
                *middles[name], name, color="black", ha="center", va="center", zorder=3,
                bbox={"facecolor": "white", "edgecolor": colour, "alpha": 0.85, "pad": 2, "linewidth": 1.5},
            )  # fmt: skip
        first, second = groups["shares"]
        axes.set_xlabel(f"axis 1: {_percent(first)} of what sets the groups' means apart (cosine)")
        axes.set_ylabel(f"axis 2: {_percent(second)} (cosine)")
        rest = len(places) - len(shown)
        grey = f", {rest} other groups in grey" if rest > 0 else ""
        figure.suptitle(
            f"{_percent(groups['own_group'])} of labelled concepts are nearest to their own group's mean\n"
            f"(block {report['block']}{grey})",
            x=0.01, ha="left", fontsize=10,
        )  # fmt: skip


def _far_apart(places: Mapping[str, np.ndarray], count: int) -> list[str]:
    """Names whose places, and so labels, lie far from each other: each the farthest from those before."""
    middle = np.mean(list(places.values()), axis=0)
    chosen = [max(places, key=lambda name: float(np.linalg.norm(places[name] - middle)))]
    while len(chosen) < count:
        rest = (name for name in places if name not in chosen)
        chosen.append(
            max(rest, key=lambda name: min(float(np.linalg.norm(places[name] - places[c])) for c in chosen))
        )
    return chosen


def draw_signal(report: Report, output: str | Path) -> None:
    """Draw the length of directions over the standard error of their means, by block."""
    by_block = report["signal"]
    blocks = sorted(map(int, by_block))

    def curve(name: str, quantile: str) -> list[float]:
        return [by_block[str(block)][name][quantile] for block in blocks]

    with new_figure(output, width=6.4, height=3.0) as figure:
        left, right = figure.subplots(1, 2)
        left.fill_between(blocks, curve("ratio", "0.05"), curve("ratio", "0.95"), color=COLOURS[0], alpha=0.2)
        left.plot(blocks, curve("ratio", "0.5"), "o-", color=COLOURS[0])
        left.axhline(1, color="0.5", linestyle=":")
        left.annotate("all noise", (blocks[0], 1), xytext=(0, 3), textcoords="offset points", color="0.4")
        left.set_ylim(bottom=0)
        left.set_ylabel("‖D‖ / standard error of the mean")
        lowest = min(curve("ratio", "0.05"))
        left.set_title(f"95 % of directions: over {lowest:.1f} × noise")
        _block_axis(left, blocks)
        norms = np.array([report["median_norm"][str(block)] for block in blocks])
        kinds = (("spread", "one reading's scatter"), ("norms", "‖D‖"), ("errors", "standard error"))
        for colour, (name, label) in zip(COLOURS, kinds, strict=False):
            values = np.array(curve(name, "0.5")) / norms
            right.plot(blocks, values, "o-", color=colour, label=label)
        right.set_ylim(0, 1.5 * right.get_ylim()[1])
        right.set_ylabel("of the block's median ‖z‖")
        right.set_title("Medians over the concepts")
        right.legend(loc="upper right")
        _block_axis(right, blocks)


def draw_identification(report: Report, output: str | Path) -> None:
    """Draw top-1 and top-5 by block: at the word of unseen sentences, and from definitions without it."""
    found = report["identification"]
    centres = found["centres"]
    blocks = sorted(map(int, centres["ordinary"]))
    kinds = set(centres["ordinary"][str(blocks[0])]["by_kind"])
    # After its definition, which was harvested too, a word is nearly always known: that is no test.
    word = sorted(kinds - {*WITHOUT_WORD, "definition"})
    curves = [(AT_WORD, word)] if word else []
    without = ((ASKED, "definition, asked for the word"), (ALONE, "definition alone"))
    curves += [(name, [kind]) for kind, name in without if kind in kinds]
    titles = {"ordinary": "Centred as the operator does", "readings": "Centred on readings of the kind"}
    shares = {
        (centre, name): {what: _pooled(centres[centre], blocks, members, what) for what in ("top1", "top5")}
        for centre in titles
        for name, members in curves
    }

    def best(name: str) -> tuple[float, int]:
        return max(
            (float(v), b) for c in titles for v, b in zip(shares[c, name]["top1"], blocks, strict=True)
        )

    with new_figure(output, width=6.4, height=4.2) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (centre, title) in zip(panels, titles.items(), strict=True):
            for colour, (name, _) in zip(COLOURS, curves, strict=False):
                share, block = best(name)
                label = f"{name}: at best {_percent(share)}, block {block}"
                axes.plot(blocks, 100 * shares[centre, name]["top1"], "o-", color=colour, label=label)
                axes.plot(blocks, 100 * shares[centre, name]["top5"], "--", color=colour, linewidth=1)
            axes.set_title(title)
            axes.set_ylim(-2, 103)
            _block_axis(axes, blocks)
        panels[0].plot([], [], "--", color="0.4", linewidth=1, label="the same, among the nearest 5")
        panels[0].set_ylabel("right concept is the nearest atom, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=1)
        without_word = [best(name)[0] for name, _ in curves if name != AT_WORD]
        parts = [f"{_percent(best(AT_WORD)[0])} are known at their word"] if word else []
        parts += [f"{_percent(max(without_word))} by their definition at best"] if without_word else []
        figure.suptitle(f"Of {found['atoms']:,} concepts {', '.join(parts)}", x=0.01, ha="left", fontsize=10)


def _pooled(by_block: Report, blocks: list[int], kinds: list[str], what: str) -> np.ndarray:
    """The share over several kinds of texts together, [blocks]; NaN where none was read."""
    values = []
    for block in blocks:
        rows = [row for kind in kinds if (row := by_block[str(block)]["by_kind"][kind])["texts"]]
        texts = sum(row["texts"] for row in rows)
        values.append(sum(row[what] * row["texts"] for row in rows) / texts if texts else math.nan)
    return np.array(values)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _block_axis(axes: Any, blocks: list[int]) -> None:
    step = -(-len(blocks) // 7)
    axes.set_xticks(blocks[::step])
    axes.set_xlabel("decoder block")


def _random_below(cosine: float, dim: int) -> float:
    """The chance that |cos| of two random directions is below a value; nearly normal of variance 1 / d."""
    return math.erf(cosine * math.sqrt(dim / 2))


def _random_quantile(share: float, dim: int) -> float:
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _random_below(middle, dim) < share else (low, middle)
    return low
