"""Draws the figures of a report as files: curves, searches against training, and the trade-off between two measures, as SVG and PNG."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..bench.files import write_atomically
from .board import Board
from .formatting import plain
from .frontier import SERVED
from .measures import default_axes
from .method_colours import row_styles
from .report_data import ReportData

MAX_BANDS = 6  # lines; the bands of more lines would hide one another


def write_figures(board: Board, report: ReportData, folder: Path) -> list[Path]:
    """Write curves, frontier and pareto as SVG and PNG; returns the paths of those that there are data for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("curves", _draw_curves), ("frontier", _draw_frontier), ("pareto", _draw_pareto)):
        figure = draw(board, report)
        if figure is None:
            continue
        # The same data make the same bytes: no date, no version, no random names.
        for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            with matplotlib.rc_context({"svg.hashsalt": "gpobench", "svg.fonttype": "none"}):
                save = partial(figure.savefig, format=kind, metadata=metadata)
                write_atomically(folder / f"{name}.{kind}", save)
            paths.append(folder / f"{name}.{kind}")
        pyplot.close(figure)
    return paths


def _draw_curves(board: Board, report: ReportData) -> Any:
    from matplotlib import pyplot

    clock = board.clock
    key = board.key if any(board.key in c.scores for c in report.curves) else None
    curves = [c for c in report.curves if key in c.scores and clock in c.spent]
    if not curves or key is None:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    styles = row_styles({r.label: r.method for r in board.rows})
    end = max(c.spent[clock][-1] for c in curves)
    for k, c in enumerate(curves):
        x, (mean, low, high) = c.spent[clock], zip(*((e.mean, e.low, e.high) for e in c.scores[key]), strict=True)
        style = styles[c.label]
        dash = ":" if len(x) < 3 else style.dash  # dotted: there is no eval point between the first and the last
        axes.plot(x, mean, color=style.light, linestyle=dash, label=plain(c.label))
        if len(curves) > MAX_BANDS:  # in place of bands each line's last interval, side by side
            at, arms = end * (1.02 + 0.012 * k), [[mean[-1] - low[-1]], [high[-1] - mean[-1]]]
            axes.errorbar(at, mean[-1], yerr=arms, fmt=".", color=style.light, elinewidth=1)
        else:
            axes.fill_between(x, low, high, alpha=0.12, color=style.light, linewidth=0)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1.001 * end])
    axes.set_xlabel(f"spent: {plain(clock)}")
    axes.set_ylabel(f"{plain(key)}, validation, 95 % interval")
    return _finish(figure, axes)


def _draw_frontier(board: Board, report: ReportData) -> Any:
    from matplotlib import pyplot, ticker

    if not board.frontiers:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    styles = row_styles({r.label: r.method for r in board.rows})
    for frontier in board.frontiers:
        x = [p.nfe for p in frontier.points]
        mean, low, high = zip(*((p.gain.mean, p.gain.low, p.gain.high) for p in frontier.points), strict=True)
        style = styles[frontier.label]
        axes.plot(
            x, mean, color=style.light, linestyle=style.dash, marker="o", markersize=4, label=plain(frontier.label)
        )
        axes.fill_between(x, low, high, alpha=0.14, color=style.light, linewidth=0)
        if len(x) < 2:
            axes.errorbar(x, mean, yerr=[[mean[0] - low[0]], [high[0] - mean[0]]], color=style.light, elinewidth=1)
    first = board.frontiers[0]
    for row in first.trained:
        x, style = [row.nfe(first.nfe_an_image, images) for images in SERVED], styles[row.label]
        axes.plot(
            x, [row.gain.mean] * len(x), color=style.light, linestyle=style.dash, marker=".", label=plain(row.label)
        )
        arms = [[row.gain.mean - row.gain.low], [row.gain.high - row.gain.mean]]
        axes.errorbar(x[-1], row.gain.mean, yerr=arms, color=style.light, elinewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(
        f"nfe per served image; dots of a trained row: {SERVED[0]:,.0f} (right) to {SERVED[-1]:,.0f} served images"
    )
    axes.set_ylabel(f"gain in {plain(first.key)}, 95 % interval")
    return _finish(figure, axes)


def _draw_pareto(board: Board, report: ReportData) -> Any:
    from matplotlib import pyplot

    across, up = (report.measures[k] for k in default_axes(board, report.measures))
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    styles = row_styles({r.label: r.method for r in board.rows})
    for row in board.rows:
        if row.label not in across.values or row.label not in up.values:
            continue
        x, y, style = across.values[row.label], up.values[row.label], styles[row.label]
        arms = [[[e.mean - e.low], [e.high - e.mean]] for e in (x, y)]
        axes.errorbar(
            x.mean, y.mean, xerr=arms[0], yerr=arms[1], fmt=style.marker, color=style.light, label=plain(row.label),
            elinewidth=0.8,
        )  # fmt: skip
    axes.set_xlabel(plain(across.name) + (", less is better" if across.less else ""))
    axes.set_ylabel(plain(up.name) + (", less is better" if up.less else ""))
    return _finish(figure, axes)


def _finish(figure: Any, axes: Any) -> Any:
    """Add a light grid and a legend beside the plot."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # A $ in a name is no formula.
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_parse_math(False)
    legend = axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.set_layout_engine("constrained")
    return figure
