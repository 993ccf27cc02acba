"""Renders the aggregate table over tasks for a terminal and as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap

from rich.cells import cell_len

from ..bench import registry
from .aggregate import RULES, AggregateTable
from .formatting import cell, csv_cell, escape_markdown, plain

FORMATS = ("terminal", "md", "csv", "json")


def render(table: AggregateTable, format: str = "terminal", *, width: int = 80) -> str:
    """Render the table as text. width: of the terminal. Raises UserError on a format without a renderer."""
    if format not in FORMATS:
        raise registry.unknown("format of --across", format, FORMATS)
    if format == "json":
        return _json(table)
    if format == "csv":
        return _csv(table)
    return _markdown(table) if format == "md" else _terminal(table, width)


def _title(table: AggregateTable) -> str:
    keys = ", ".join(f"{task} by {key}" for task, key in table.keys.items())
    return f"{len(table.keys)} tasks on {plain(table.model)}: {keys}"


def _columns(table: AggregateTable) -> list[tuple[str, list[str]]]:
    """Return the columns as (head, the cell of each row)."""
    return [
        ("method", [plain(row.label) for row in table.rows]),
        ("IQM", [cell(row.middle, sign=True) for row in table.rows]),
        (f"better than {plain(table.baseline)}", [cell(row.improvement) for row in table.rows]),
        *((plain(task), [cell(row.gains[task], sign=True) for row in table.rows]) for task in table.keys),
        ("seeds", [", ".join(map(str, row.seeds)) for row in table.rows]),
    ]


def _notes(table: AggregateTable) -> list[str]:
    return [plain(note) for note in (*table.notes, *RULES)]


def _markdown(table: AggregateTable) -> str:
    columns = _columns(table)
    cells = [
        [escape_markdown(text) for text in line]
        for line in zip(*((head, *texts) for head, texts in columns), strict=True)
    ]
    cells.insert(1, ["---"] * len(columns))
    lines = [f"**{escape_markdown(_title(table))}**", "", *(f"| {' | '.join(line)} |" for line in cells)]
    return "\n".join([*lines, *(f"\n{escape_markdown(note)}" for note in _notes(table))]) + "\n"


def _terminal(table: AggregateTable, width: int) -> str:
    """Render the first three columns, and as many others as fit."""
    columns, notes = _columns(table), _notes(table)
    widths = [max(map(cell_len, (head, *texts))) for head, texts in columns]
    shown, left = list[int](), width + 2
    for k, size in enumerate(widths):
        if k < 3 or size + 2 <= left:
            shown.append(k)
            left -= size + 2
    if len(shown) < len(columns):
        notes.append("More columns: --format md, csv or json.")
    pad = lambda k, text: text + " " * (widths[k] - cell_len(text))
    rows = [[columns[k][0] for k in shown], *([columns[k][1][i] for k in shown] for i in range(len(table.rows)))]
    lines = ["  ".join(map(pad, shown, row)).rstrip() for row in rows]
    wrap = lambda text: "\n".join(textwrap.wrap(text, width))
    return "\n".join([wrap(_title(table)), "", *lines, "", *map(wrap, notes)]) + "\n"


def _csv(table: AggregateTable) -> str:
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    names = ["IQM", *table.keys, f"better than {table.baseline}"]
    write.writerow(["method", "seeds", *(csv_cell(f"{name}{end}") for name in names for end in ("", " low", " high"))])
    for row in table.rows:
        numbers = [row.middle, *(row.gains[task] for task in table.keys), row.improvement]
        ends = [x for e in numbers for x in ((e.mean, e.low, e.high) if e else (math.nan,) * 3)]
        texts = [f"{x:.6g}" if math.isfinite(x) else "" for x in ends]
        write.writerow([csv_cell(row.label), " ".join(map(str, row.seeds)), *texts])
    return out.getvalue()


def _json(table: AggregateTable) -> str:
    finite = lambda x: x if math.isfinite(x) else None
    estimate = lambda e: e and {"value": finite(e.mean), "ci_low": finite(e.low), "ci_high": finite(e.high)}
    whole = {
        "schema_version": 1,
        "model": table.model,
        "baseline": table.baseline,
        "keys": dict(table.keys),
        "rules": list(RULES),
        "notes": list(table.notes),
        "rows": [
            {"label": row.label, "train_seeds": list(row.seeds), "iqm": estimate(row.middle),
             "gains": {task: estimate(e) for task, e in row.gains.items()}, "improvement": estimate(row.improvement)}
            for row in table.rows
        ],
    }  # fmt: skip
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"
