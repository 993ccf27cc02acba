"""Renders the HTML page of a report: one self-contained file with table, curves, trade-offs, images, prompts and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from ..bench.stats.intervals import Estimate
from .album import Album
from .board import BASE, RULES, Board
from .columns import in_shown_order
from .formatting import MARKS, cell, number, p_value, plain, spend, transfer, transfer_head
from .frontier import SERVED
from .measures import default_axes
from .method_colours import row_styles
from .render_frontier import frontier_sections
from .report_data import ReportData
from .runs import LoadedRun

STRIP_WIDTH = 150  # pixels of the drawing of an interval in the table


def page(board: Board, report: ReportData) -> str:
    """Render one HTML file. Names and prompts are escaped: markup in them is shown and not interpreted."""
    from jinja2 import Environment, StrictUndefined

    folder = resources.files(__package__ or "")
    text = {name: folder.joinpath(name).read_text("utf-8") for name in ("report.html.jinja", "report.css", "report.js")}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Any] = environment.filters
    filters.update(
        {"plain": plain, "parts": _parts, "p": p_value, "number": number, "duration": _duration, "until": _until}
    )
    return environment.from_string(text["report.html.jinja"]).render(
        css=text["report.css"],
        js=text["report.js"],
        data=_script_data(board, report),
        marks=MARKS,
        rules=RULES,
        spend=spend,
        revision=_revision,
        **_board_values(board),
        **_run_values(report),
        notes=[plain(note) for note in (*board.notes, *report.notes)],
    )


def _board_values(board: Board) -> dict[str, Any]:
    """Return the template's variables about the table."""
    return {
        "title": f"{plain(board.task)} on {plain(board.model)}",
        "board": board,
        "base": board.base_row,
        "bounds": ", ".join(f"{plain(str(k))} {v:,.0f}" for k, v in board.budget.items()) or "none",
        "split": plain(str(board.evaluation.get("split", "test"))),
        "columns": in_shown_order(board),
        "transfer": transfer,
        "transfer_head": plain(transfer_head(board).removeprefix("transfer (").removesuffix(")")),
        "embedders": list(dict.fromkeys(name for r in board.rows for name in r.cmmd)),
        "currencies": list(dict.fromkeys(c for r in board.rows for c in r.spent)),
        "reported": _reported(board),
        "strips": _strips(board),
        "colours": {label: colour for label, (colour, _) in _line_styles(board).items()},
        "configs": _configs(board),
        "searches": frontier_sections(board),
    }


def _run_values(report: ReportData) -> dict[str, Any]:
    """Return the template's variables about the runs."""
    rows = report.rows
    reasons = {
        label: list(dict.fromkeys(why for run in group for why in run.record.failures)) for label, group in rows.items()
    }
    return {
        "report": report,
        "roles": _roles(rows),
        "scorers": _scorers(rows),
        "runs": [(label, run) for label, group in rows.items() for run in group],
        "versions": _versions(rows),
        "tunings": {
            label: str(group[0].record.tuning["command"])
            for label, group in rows.items()
            if group and group[0].record.tuning.get("command")
        },
        "failures": {label: whys for label, whys in reasons.items() if whys},
    }


def _parts(e: Estimate | None, sign: bool = False) -> tuple[str, str]:
    """Format the mean and its interval as two texts."""
    mean, bracket, rest = cell(e, sign).partition(" [")
    return mean, f"[{rest}" if bracket else ""


def _until(e: Estimate, currency: str) -> str:
    """Format 12,000 [9,000, 15,000], or words where the target is not reached within the budget."""
    if math.isinf(e.mean):
        return "not within the budget"
    ends = [spend(currency, x) if math.isfinite(x) else "beyond" if x > 0 else "-" for x in (e.low, e.high)]
    return f"{spend(currency, e.mean)} [{', '.join(ends)}]"


def _reported(board: Board) -> dict[str, dict[tuple[str, str], list[str]]]:
    """Map method, then metric and unit, to the numbers that papers report."""
    reported: dict[str, dict[tuple[str, str], list[str]]] = {}
    for paper in board.reported:
        reported.setdefault(paper.method, {}).setdefault((paper.metric, paper.unit), []).append(f"{paper.value:g}")
    return reported


def _duration(seconds: float) -> str:
    """Format seconds as 6 s, 4 min or 2.5 h."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _strips(board: Board) -> dict[str, Any]:
    """Map label to start, mean and end of the key's interval, and the mean of the base, all in pixels."""
    estimates = {r.label: r.cells[board.key].after for r in board.rows if board.key in r.cells}
    ends = [x for e in estimates.values() for x in (e.low, e.mean, e.high) if math.isfinite(x)]
    if not ends:
        return {}
    low, high = min(ends), max(ends)
    place = lambda x: round(4 + (STRIP_WIDTH - 8) * (x - low) / ((high - low) or 1), 1)
    return {
        label: {
            "low": place(e.low if math.isfinite(e.low) else e.mean),
            "mean": place(e.mean),
            "high": place(e.high if math.isfinite(e.high) else e.mean),
            "base": place(estimates[BASE].mean) if BASE in estimates and math.isfinite(estimates[BASE].mean) else None,
        }
        for label, e in estimates.items()
        if math.isfinite(e.mean)
    }


def _configs(board: Board) -> list[tuple[str, list[tuple[str | None, bool]], bool]]:
    """List (setting, values, whether rows differ in it); settings that all rows have come first.

    values: for every row but the base (value, whether it is not the first row's), None where the row has no such setting.
    """
    tables = [_flat(r.settings) for r in board.rows if r.kind != "base"]
    lines: list[tuple[str, list[tuple[str | None, bool]], bool]] = []
    for key in dict.fromkeys(key for table in tables for key in table):
        values = [_text(table[key]) if key in table else None for table in tables]
        marked = [(value, None not in (value, values[0]) and value != values[0]) for value in values]
        lines.append((key.removeprefix("settings."), marked, len(set(values)) > 1))
    return sorted(lines, key=lambda line: any(value is None for value, _ in line[1]))


def _revision(provenance: Mapping[str, Any]) -> str:
    """Return the first 12 digits of the commit, with `-dirty` where files differed from it."""
    commit, dash, rest = str(provenance.get("revision", "")).partition("-")
    return commit[:12] + dash + rest if commit else "unknown"


def _text(value: Any) -> str:
    return plain(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to their dotted names."""
    import pandas as pd

    return dict(pd.json_normalize(dict(table)).iloc[0]) if table else {}


def _roles(rows: Mapping[str, Sequence[LoadedRun]]) -> dict[str, dict[str, float]]:
    """Map label, then role, to network evaluations, the mean over seeds."""
    names = dict.fromkeys(role for group in rows.values() for run in group for role in run.record.nfe_by_role)
    return {
        label: {role: float(np.mean([run.record.nfe_by_role.get(role, 0) for run in group])) for role in names}
        for label, group in rows.items()
        if group
    }


def _scorers(rows: Mapping[str, Sequence[LoadedRun]]) -> list[dict[str, Any]]:
    """List for each scorer or embedder its id, its role, and its calls, seconds and errors in training, summed over all runs."""
    lines: dict[str, dict[str, Any]] = {}
    for run in (run for group in rows.values() for run in group):
        for name, use in run.record.scorers.items():
            zero = {"name": name, "id": use.id, "role": use.role, "calls": 0, "seconds": 0.0, "errors": 0}
            line = lines.setdefault(name, zero)
            for column, amount in (("calls", use.calls), ("seconds", use.seconds), ("errors", use.errors)):
                line[column] += amount
        for name, text in run.record.embedders.items():
            zero = {"name": name, "id": text, "role": "embedder", "calls": 0, "seconds": 0.0, "errors": 0}
            lines.setdefault(f"embedder {name}", zero)
    return list(lines.values())


def _versions(rows: Mapping[str, Sequence[LoadedRun]]) -> dict[str, str]:
    """Map package to its version; several where runs differ."""
    by_package: dict[str, dict[str, None]] = {}
    for run in (run for group in rows.values() for run in group):
        for name, version in run.record.provenance.get("versions", {}).items():
            by_package.setdefault(str(name), {})[str(version)] = None
    return {name: " and ".join(versions) for name, versions in by_package.items()}


# The data of the page's script


def _line_styles(board: Board) -> dict[str, tuple[str, int]]:
    """Map label to the CSS colour of its method and to its place among the rows of that method."""
    styles = row_styles({r.label: r.method for r in board.rows})
    return {label: (f"light-dark({style.light}, {style.dark})", style.variant) for label, style in styles.items()}


def _script_data(board: Board, report: ReportData) -> dict[str, Any]:
    """Encode curves, trade-offs, images and colours as strict JSON: null, never NaN."""
    return {
        "key": board.key,
        "clock": board.clock,
        "labels": [plain(r.label) for r in board.rows],
        "styles": {
            plain(label): {"colour": colour, "variant": variant}
            for label, (colour, variant) in _line_styles(board).items()
        },
        "curves": [
            {
                "label": plain(c.label),
                "spent": {name: [_short(x) for x in xs] for name, xs in c.spent.items()},
                "scores": {key: [_mean_and_ends(e) for e in es] for key, es in c.scores.items()},
            }
            for c in report.curves
        ],
        "measures": [
            {
                "name": m.name,
                "less": m.less,
                "values": {plain(label): _mean_and_ends(e) for label, e in m.values.items()},
            }
            for m in report.measures
        ],
        "served": [int(images) for images in SERVED],
        "frontiers": [
            {
                "label": plain(f.label),
                "key": plain(f.key),
                "nfe": f.nfe_an_image,
                "points": [
                    {"candidates": _short(p.candidates), "nfe": _short(p.nfe), "gain": _mean_and_ends(p.gain)}
                    for p in f.points
                ],
                "rows": [
                    {"label": plain(row.label), "spent": _short(row.spent), "gain": _mean_and_ends(row.gain)}
                    for row in f.trained
                ],
            }
            for f in board.frontiers
        ],
        "across": default_axes(board, report.measures),
        "training": [c.key for c in board.columns if c.role == "training"],
        "album": report.album and _album_data(report.album, report.texts),
    }


def _album_data(album: Album, texts: Sequence[str]) -> dict[str, Any]:
    return {
        "pictures": list(album.pictures),
        "size": list(album.size),
        "noises": [[p, o, texts[p] if p < len(texts) else ""] for p, o in album.noises],
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
    }


def _mean_and_ends(e: Estimate) -> list[float | None]:
    return [_short(x) for x in (e.mean, e.low, e.high)]


def _short(x: float) -> float | None:
    return float(f"{x:.5g}") if math.isfinite(x) else None
