"""A page to read a comparison by: the table, curves, trade-offs, pictures, prompts and settings, in one file that needs no network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..bench.files import write_atomically
from ..bench.stats.intervals import Estimate
from . import report_data
from .board import BASE, RULES, Board, LoadedRun
from .render import MARKS, cell, number, p_value, plain, spend
from .report_data import Album, Breakdown, Case, Curve, Measure, Pace

MANY = 6  # lines, from where bands of all of them hide one another
STRIP = (150, 18)  # pixels: the drawing of an interval in the table


@dataclass(frozen=True)
class Evidence:
    """Everything a page shows beside the table."""

    rows: Mapping[str, Sequence[LoadedRun]]  # label -> its runs
    texts: Sequence[str]  # the test prompts
    curves: Sequence[Curve]
    pace: Pace | None
    measures: Sequence[Measure]
    parts: Sequence[Breakdown]
    hardest: Mapping[str, tuple[Sequence[Case], Sequence[Case]]]  # label -> lowest, largest losses
    album: Album | None
    notes: Sequence[str]  # on what is not here


def gather(board: Board, runs: Sequence[LoadedRun]) -> Evidence:
    """Read what the runs of a table left beside their scores. Raises UserError on a file that cannot be read."""
    rows = report_data.groups(board, runs)
    measured = {label: group for label, group in rows.items() if group}
    clock = next(iter(board.budget), "nfe")
    drawn = {label: report_data.curve(label, group, clock) for label, group in measured.items()}
    texts = [plain(text) for text in report_data.texts(runs[0])]
    scored = [c.key for c in board.columns if c.role in ("training", "held-out", "auxiliary")]
    album = report_data.album(measured, scored)
    lacking = {
        "curve": [label for label, one in drawn.items() if one is None],
        "pictures": [label for label in measured if album is None or label not in album.frames],
    }
    curves = [one for one in drawn.values() if one]
    return Evidence(
        rows=rows,
        texts=texts,
        curves=curves,
        pace=report_data.pace(curves, rows, board.key, clock, board.budget.get(clock, math.nan)),
        measures=report_data.measures(board),
        parts=report_data.breakdowns(board, rows, texts),
        hardest={label: report_data.hardest(group, board.key) for label, group in measured.items()},
        album=album,
        notes=[f"No {what} kept by: {', '.join(labels)}." for what, labels in lacking.items() if labels],
    )


# The page


def page(board: Board, found: Evidence) -> str:
    """One HTML file. Names and prompts are data: what looks like markup in them is shown, not obeyed."""
    from jinja2 import Environment, StrictUndefined

    here = resources.files(__package__ or "")
    text = {name: here.joinpath(name).read_text("utf-8") for name in ("report.html.jinja", "report.css", "report.js")}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Any] = environment.filters
    filters.update({"plain": plain, "parts": _parts, "p": p_value, "number": number, "clock": _clock, "until": _until})
    return environment.from_string(text["report.html.jinja"]).render(
        css=text["report.css"],
        js=text["report.js"],
        data=_data(board, found),
        title=f"{plain(board.task)} on {plain(board.model)}",
        board=board,
        base=next(r for r in board.rows if r.kind == "base"),
        bounds=", ".join(f"{plain(str(k))} {v:,.0f}" for k, v in board.budget.items()) or "none",
        split=plain(str(board.evaluation.get("split", "test"))),
        columns=sorted(board.columns, key=lambda c: c.key != board.key),
        embedders=list(dict.fromkeys(name for r in board.rows for name in r.cmmd)),
        currencies=list(dict.fromkeys(c for r in board.rows for c in r.spent)),
        spend=spend,
        ranks=Counter(r.rank for r in board.rows),
        reported=_reported(board),
        strips=_strips(board),
        marks=MARKS,
        notes=[plain(note) for note in (*board.notes, *found.notes)],
        rules=RULES,
        found=found,
        configs=_configs(board),
        roles=_roles(found.rows),
        scorers=_scorers(found.rows),
        runs=[(label, run) for label, group in found.rows.items() for run in group],
        versions=_versions(found.rows),
        revision=_revision,
        tunings={
            label: str(group[0].record.tuning["command"])
            for label, group in found.rows.items()
            if group and group[0].record.tuning.get("command")
        },
        failures={
            label: whys
            for label, group in found.rows.items()
            if (whys := list(dict.fromkeys(why for run in group for why in run.record.failures)))
        },
    )


def _parts(e: Estimate | None, sign: bool = False) -> tuple[str, str]:
    """The number and its interval, apart."""
    mean, bracket, rest = cell(e, sign).partition(" [")
    return mean, f"[{rest}" if bracket else ""


def _until(e: Estimate, currency: str) -> str:
    """12,000 [9,000, 15,000]; an end beyond the budget has no number."""
    if math.isinf(e.mean):
        return "not within the budget"
    ends = [spend(currency, x) if math.isfinite(x) else "beyond" if x > 0 else "-" for x in (e.low, e.high)]
    return f"{spend(currency, e.mean)} [{', '.join(ends)}]"


def _reported(board: Board) -> dict[str, dict[tuple[str, str], list[str]]]:
    """Method -> metric and unit -> the numbers papers print of it."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for one in board.reported:
        found.setdefault(one.method, {}).setdefault((one.metric, one.unit), []).append(f"{one.value:g}")
    return found


def _clock(seconds: float) -> str:
    """6 s, 4 min, 2.5 h."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _strips(board: Board) -> dict[str, Any]:
    """Label -> where the interval of the key starts, its middle and its end, in pixels; and where the base stands."""
    known = {r.label: r.cells[board.key].after for r in board.rows if board.key in r.cells}
    ends = [x for e in known.values() for x in (e.low, e.mean, e.high) if math.isfinite(x)]
    if not ends:
        return {}
    low, high = min(ends), max(ends)
    place = lambda x: round(4 + (STRIP[0] - 8) * (x - low) / ((high - low) or 1), 1)
    return {
        label: {
            "low": place(e.low if math.isfinite(e.low) else e.mean),
            "mean": place(e.mean),
            "high": place(e.high if math.isfinite(e.high) else e.mean),
            "base": place(known[BASE].mean) if BASE in known and math.isfinite(known[BASE].mean) else None,
        }
        for label, e in known.items()
        if math.isfinite(e.mean)
    }


def _configs(board: Board) -> list[tuple[str, list[tuple[str | None, bool]], bool]]:
    """Setting; of every row but the base its value, None where it has no such setting, and whether it is another than the
    first row's; whether rows differ in it. Settings that all rows have come first."""
    tables = [_flat(r.settings) for r in board.rows if r.kind != "base"]
    lines: list[tuple[str, list[tuple[str | None, bool]], bool]] = []
    for key in dict.fromkeys(key for table in tables for key in table):
        values = [_said(table[key]) if key in table else None for table in tables]
        marked = [(value, None not in (value, values[0]) and value != values[0]) for value in values]
        lines.append((key.removeprefix("settings."), marked, len(set(values)) > 1))
    return sorted(lines, key=lambda line: any(value is None for value, _ in line[1]))


def _revision(provenance: Mapping[str, Any]) -> str:
    """The commit as people write it, with `-dirty` where files differed from it."""
    commit, dash, rest = str(provenance.get("revision", "")).partition("-")
    return commit[:12] + dash + rest if commit else "unknown"


def _said(value: Any) -> str:
    return plain(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by their dotted names."""
    import pandas as pd

    return dict(pd.json_normalize(dict(table)).iloc[0]) if table else {}


def _roles(rows: Mapping[str, Sequence[LoadedRun]]) -> dict[str, dict[str, float]]:
    """Label -> evaluations of the network by what they were for, the mean over seeds."""
    names = dict.fromkeys(role for group in rows.values() for run in group for role in run.record.nfe_by_role)
    return {
        label: {role: float(np.mean([run.record.nfe_by_role.get(role, 0) for run in group])) for role in names}
        for label, group in rows.items()
        if group
    }


def _scorers(rows: Mapping[str, Sequence[LoadedRun]]) -> list[dict[str, Any]]:
    """One line a scorer or embedder: its id, its role and how long it took in training, over all runs."""
    lines: dict[str, dict[str, Any]] = {}
    for run in (run for group in rows.values() for run in group):
        for name, use in run.record.scorers.items():
            nothing = {"name": name, "id": use.id, "role": use.role, "calls": 0, "seconds": 0.0, "errors": 0}
            line = lines.setdefault(name, nothing)
            for what, more in (("calls", use.calls), ("seconds", use.seconds), ("errors", use.errors)):
                line[what] += more
        for name, text in run.record.embedders.items():
            nothing = {"name": name, "id": text, "role": "embedder", "calls": 0, "seconds": 0.0, "errors": 0}
            lines.setdefault(f"embedder {name}", nothing)
    return list(lines.values())


def _versions(rows: Mapping[str, Sequence[LoadedRun]]) -> dict[str, str]:
    """Package -> its version; several where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for run in (run for group in rows.values() for run in group):
        for name, version in run.record.provenance.get("versions", {}).items():
            found.setdefault(str(name), {})[str(version)] = None
    return {name: " and ".join(versions) for name, versions in found.items()}


# What the page's own code draws


def _data(board: Board, found: Evidence) -> dict[str, Any]:
    """Curves, trade-offs and pictures as JSON holds them: no NaN."""
    album = found.album
    return {
        "key": board.key,
        "clock": next(iter(board.budget), "nfe"),
        "labels": [plain(r.label) for r in board.rows],
        "curves": [
            {
                "label": plain(c.label),
                "spent": {name: [_short(x) for x in xs] for name, xs in c.spent.items()},
                "scores": {key: [_three(e) for e in es] for key, es in c.scores.items()},
            }
            for c in found.curves
        ],
        "measures": [
            {"name": m.name, "less": m.less, "values": {plain(label): _three(e) for label, e in m.values.items()}}
            for m in found.measures
        ],
        "across": first_measures(board, found.measures),
        "training": [c.key for c in board.columns if c.role == "training"],
        "album": album
        and {
            "pictures": list(album.pictures),
            "size": list(album.size),
            "noises": [[p, o, found.texts[p] if p < len(found.texts) else ""] for p, o in album.noises],
            "seeds": {plain(label): seed for label, seed in album.seeds.items()},
            "frames": {
                plain(label): [
                    {
                        "pictures": [f.before, f.after],
                        "scores": {key: [_short(x) for x in both] for key, both in f.scores.items()},
                        "notes": {name: [plain(text) for text in both] for name, both in f.notes.items()},
                    }
                    for f in frames
                ]
                for label, frames in album.frames.items()
            },
        },
    }


def first_measures(board: Board, measures: Sequence[Measure]) -> tuple[int, int]:
    """Which two are shown first: the drift, or the training scorer where none was measured, and the key."""
    names = [m.name for m in measures]
    up = next(k for k, name in enumerate(names) if name.startswith(f"{board.key} ("))
    wanted = [c for role in ("drift", "training", "auxiliary") for c in board.columns if c.role == role]
    across = [names.index(f"{c.key} ({c.role})") for c in wanted if c.key != board.key]
    return next(iter(across), len(names) - 1), up


def _three(e: Estimate) -> list[float | None]:
    return [_short(x) for x in (e.mean, e.low, e.high)]


def _short(x: float) -> float | None:
    return float(f"{x:.5g}") if math.isfinite(x) else None


# The same plots as files


def plots(board: Board, found: Evidence, folder: Path) -> list[Path]:
    """curves and pareto as SVG and PNG, for a paper or a README; the paths of those there is something to draw for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("curves", _draw_curves), ("pareto", _draw_pareto)):
        figure = draw(board, found)
        if figure is None:
            continue
        # The same data make the same bytes: no date, no version, no random names.
        for kind, facts in (("svg", {"Date": None}), ("png", {"Software": None})):
            with matplotlib.rc_context({"svg.hashsalt": "gpobench", "svg.fonttype": "none"}):
                save = partial(figure.savefig, format=kind, metadata=facts)
                write_atomically(folder / f"{name}.{kind}", save)
            made.append(folder / f"{name}.{kind}")
        pyplot.close(figure)
    return made


def _draw_curves(board: Board, found: Evidence) -> Any:
    from matplotlib import pyplot

    clock = next(iter(board.budget), "nfe")
    key = board.key if any(board.key in c.scores for c in found.curves) else None
    drawn = [c for c in found.curves if key in c.scores and clock in c.spent]
    if not drawn or key is None:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    many, end = len(drawn) > MANY, max(c.spent[clock][-1] for c in drawn)
    for k, c in enumerate(drawn):
        x, (mean, low, high) = c.spent[clock], zip(*((e.mean, e.low, e.high) for e in c.scores[key]), strict=True)
        style = ":" if len(x) < 3 else "-" if k < 10 else "--"  # dotted: nothing was looked at in between
        (line,) = axes.plot(x, mean, color=f"C{k % 10}", linestyle=style, label=plain(c.label))
        if many:  # bands would hide one another: each line's last interval, side by side
            at, arms = end * (1.02 + 0.012 * k), [[mean[-1] - low[-1]], [high[-1] - mean[-1]]]
            axes.errorbar(at, mean[-1], yerr=arms, fmt=".", color=line.get_color(), elinewidth=1)
        else:
            axes.fill_between(x, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1.001 * end])
    axes.set_xlabel(f"spent: {plain(clock)}")
    axes.set_ylabel(f"{plain(key)}, validation, 95 % interval")
    return _finish(figure, axes)


def _draw_pareto(board: Board, found: Evidence) -> Any:
    from matplotlib import pyplot

    across, up = (found.measures[k] for k in first_measures(board, found.measures))
    labels = [r.label for r in board.rows if r.label in across.values and r.label in up.values]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    for k, label in enumerate(labels):
        x, y = across.values[label], up.values[label]
        arms = [[[e.mean - e.low], [e.high - e.mean]] for e in (x, y)]
        marker = "s" if label == BASE else "o" if k < 10 else "^"
        axes.errorbar(
            x.mean, y.mean, xerr=arms[0], yerr=arms[1], fmt=marker, color=f"C{k % 10}", label=plain(label),
            elinewidth=0.8,
        )  # fmt: skip
    axes.set_xlabel(plain(across.name) + (", less is better" if across.less else ""))
    axes.set_ylabel(plain(up.name) + (", less is better" if up.less else ""))
    return _finish(figure, axes)


def _finish(figure: Any, axes: Any) -> Any:
    """A quiet grid, and the names beside the plot, where they hide nothing."""
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
