"""Renders a board for a terminal and as Markdown, CSV, JSON, LaTeX and HTML."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..bench import registry
from ..bench.stats.intervals import Estimate
from .board import RULES, Board, BoardRow

ARROW = "→"
MARKS = {"s": "one training seed", "h": "hack flag", "!": "invalid, not ranked", "t": "tuned"}


def render(board: Board, format: str = "terminal", *, width: int = 80) -> str:
    """The board as text, ending in a new line. width: of the terminal. Raises UserError on an unknown format."""
    formats: dict[str, Callable[[Board], str]] = {
        "terminal": lambda b: _terminal(b, width),
        "md": _markdown,
        "csv": _csv,
        "json": _json,
        "latex": _latex,
        "html": _html,
    }
    if format not in formats:
        raise registry.unknown("format", format, formats)
    return formats[format](board).rstrip("\n") + "\n"


# Numbers


def number(x: float, digits: int = 3, sign: bool = False) -> str:
    """.450, or +.450: without the zero before the point."""
    if not math.isfinite(x):
        return "-"
    return re.sub(r"^([+-]?)0\.(?=\d)", r"\1.", f"{x:{'+' if sign else ''}.{digits}f}")


def cell(e: Estimate | None, sign: bool = False) -> str:
    """.450 [.41, .49]: two digits of the ends, more where the interval is narrower than that, and one more of the mean."""
    if e is None:
        return ""
    if not math.isfinite(e.mean):
        return "not scored"
    half = (e.high - e.low) / 2
    digits = min(6, max(2, math.ceil(-math.log10(half)))) if half > 0 else 2
    if not math.isfinite(half):
        return f"{number(e.mean, 3, sign)} [too few]"
    return f"{number(e.mean, digits + 1, sign)} [{number(e.low, digits, sign)}, {number(e.high, digits, sign)}]"


def p_value(p: float) -> str:
    """<.001, .012; empty where nothing was tested."""
    return "" if not math.isfinite(p) else "<.001" if p < 0.001 else number(p)


def spend(currency: str, x: float) -> str:
    """40,000; 6.72e+12 flops."""
    return f"{x:.2e}" if currency == "flops" else f"{x:,.0f}"


def plain(text: str) -> str:
    """One line without control characters, which a name from outside may hold."""
    return "".join("?" if unicodedata.category(c).startswith("C") else c for c in " ".join(text.split()))


def rank(row: BoardRow, rows: Sequence[BoardRow]) -> str:
    """2, or 2= where several rows share the rank."""
    if row.rank is None:
        return "-"
    return f"{row.rank}{'=' if sum(r.rank == row.rank for r in rows) > 1 else ''}"


def _flags(row: BoardRow) -> dict[str, str]:
    """Letter of MARKS -> the mark in words, for the marks that a row has."""
    words = {
        "s": "one seed" if row.single_seed else "",
        "h": f"HACK ({row.hacked} of {len(row.seeds)} seeds)" if row.hacked else "",
        "!": "INVALID" if row.invalid else "",
        "t": f"tuned in {row.trials} trials" if row.trials else "",
    }
    return {letter: text for letter, text in words.items() if text}


def _title(board: Board) -> str:
    bounds = ", ".join(f"{plain(str(k))} {v:,.0f}" for k, v in board.budget.items()) or "none"
    n = board.base_row.cells[board.key].after.n
    split = board.evaluation.get("split", "test")
    return (
        f"{plain(board.task)} (version {plain(board.task_version)}) on {plain(board.model)}, budget {bounds}: "
        f"ranked by {plain(board.key)} over {n:,} {plain(str(split))} prompts"
    )


# For a terminal


def _terminal(board: Board, width: int) -> str:
    """The columns that fit: rank, row, key, difference, p, marks, then training scorer, first budget currency, seeds and the rest."""
    from rich.cells import cell_len

    rows = board.rows
    legend = [MARKS[m] for m in MARKS if any(m in _flags(r) for r in rows)]
    letters = [m for m in MARKS if any(m in _flags(r) for r in rows)]
    others = [c.key for c in board.columns if c.key != board.key]
    training = [c.key for c in board.columns if c.role == "training" and c.key != board.key]
    currency = board.clock

    def scores(key: str) -> list[str]:
        return [cell(r.cells[key].after) if key in r.cells else "" for r in rows]

    spent = [spend(currency, r.spent[currency]) if currency in r.spent else "" for r in rows]
    seeds = [str(len(r.seeds) or "") for r in rows]
    must = [
        ("", [rank(r, rows) for r in rows]),
        ("", [plain(r.label) for r in rows]),
        (board.key, scores(board.key)),
        (f"minus {plain(board.baseline)}", [cell(r.versus, sign=True) for r in rows]),
        ("p", [p_value(r.holm) for r in rows]),
        ("", ["".join(_flags(r)) for r in rows]),
    ]
    more = [(key, scores(key)) for key in training[:1]]
    more += [(currency, spent), ("seeds", seeds)]
    more += [(key, scores(key)) for key in others if key not in training[:1]]
    size = lambda column: max(cell_len(text) for text in (column[0], *column[1]))
    must = [(_cut(head, max(20, *map(cell_len, texts))), texts) for head, texts in must]
    room = lambda: width - sum(size(c) + 2 for c in must if any(c[1])) + 2
    if room() < 0:  # the only column of any length is the one with names
        limit = max(12, size(must[1]) + room())
        must[1] = ("", [_cut(text, limit) for text in must[1][1]])
    left = room()
    shown = [c for c in must if any(c[1])]
    for column in more:
        if any(column[1]) and size(column) + 2 <= left:
            shown.append(column)
            left -= size(column) + 2
    sizes = [size(c) for c in shown]
    pad = lambda texts: "  ".join(t + " " * (s - cell_len(t)) for t, s in zip(texts, sizes, strict=True)).rstrip()
    lines = [pad([c[0] for c in shown])] + [pad([c[1][i] for c in shown]) for i in range(len(rows))]
    notes = [*(plain(n) for n in board.notes), *RULES]
    if legend:
        notes.insert(0, "; ".join(f"{m} {text}" for m, text in zip(letters, legend, strict=True)))
    hidden = sum(any(c[1]) for c in (*must, *more)) - len(shown)
    if hidden:
        notes.append("More columns: --format md, csv, json, latex or html.")
    wrap = lambda text: "\n".join(_lines(text, width))
    parts = [
        wrap(_title(board)),
        "\n".join(lines),
        *(["\n".join(map(wrap, _reported(board)))] if board.reported else []),
    ]
    return "\n\n".join([*parts, "\n".join(map(wrap, notes))])


def _cut(text: str, limit: int) -> str:
    """At most that many character cells, of which some letters take two."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= limit else set_cell_size(text, limit - 1).rstrip() + "…"


def _lines(text: str, width: int) -> list[str]:
    """The words of a text on lines of at most that many character cells; further lines are indented as the first is."""
    from rich.cells import cell_len, chop_cells

    indent = " " * (len(text) - len(text.lstrip()))
    lines: list[str] = []
    for word in (part for w in text.split() for part in chop_cells(w, width - len(indent))):
        if lines and cell_len(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + word)
    return lines


def _reported(board: Board) -> list[str]:
    """The numbers of papers, as lines; never part of the table."""
    head = "Reported elsewhere, not measured here and in no test:"
    return [head] + [
        f"  {r.method}, {r.metric}: {r.value:g} {r.unit}{f' ({r.setting})' if r.setting else ''}, "
        f"arXiv {r.arxiv}, {r.table} [{r.provenance}]"
        for r in board.reported
    ]


# The whole table, as texts


def _table(board: Board) -> list[list[str]]:
    """Head and rows as plain text, not escaped for any format."""
    currencies = list(dict.fromkeys(c for r in board.rows for c in r.spent))
    embedders = list(dict.fromkeys(name for r in board.rows for name in r.cmmd))
    columns = sorted(board.columns, key=lambda c: c.key != board.key)
    head = ["rank", "method", f"{board.key} minus {board.baseline}", "p (Holm)"]
    for c in columns:
        head += [f"{c.key} ({c.role}): before {ARROW} after", f"{c.key}: difference"]
    head += [*(f"CMMD to the base ({name})" for name in embedders), *currencies, "seeds", "marks"]
    lines = [head]
    for r in board.rows:
        line = [rank(r, board.rows), r.label, cell(r.versus, sign=True), p_value(r.holm)]
        for c in columns:
            mine = r.cells.get(c.key)
            before = f"{cell(mine.before)} {ARROW} " if mine and mine.before else ""
            line += [before + cell(mine.after), cell(mine.delta, sign=True)] if mine else ["", ""]
        line += [cell(r.cmmd.get(name)) for name in embedders]
        line += [spend(c, r.spent[c]) if c in r.spent else "" for c in currencies]
        line += [", ".join(map(str, r.seeds)), "; ".join(_flags(r).values())]
        lines.append(line)
    return [[plain(text) for text in line] for line in lines]


def escape_markdown(text: str) -> str:
    """Escape the characters that Markdown would interpret."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", text)


def _markdown(board: Board) -> str:
    head, *rows = [[escape_markdown(text) for text in line] for line in _table(board)]
    lines = [f"**{escape_markdown(_title(board))}**", ""]
    lines += [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
    for note in (*board.notes, *RULES):
        lines += ["", escape_markdown(plain(note))]
    if board.reported:
        first, *numbers = _reported(board)
        lines += ["", escape_markdown(first), "", *(f"- {escape_markdown(plain(text))}" for text in numbers)]
    return "\n".join(lines)


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "[": "{[}", "]": "{]}", ARROW: r"$\to$", "|": r"\textbar{}",
}  # fmt: skip


def _escape_latex(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)


def _latex(board: Board) -> str:
    head, *rows = [[_escape_latex(text) for text in line] for line in _table(board)]
    lines = [rf"\begin{{tabular}}{{{'rl' + 'l' * (len(head) - 2)}}}", r"\hline"]
    lines += [" & ".join(head) + r" \\", r"\hline", *(" & ".join(line) + r" \\" for line in rows)]
    lines += [r"\hline", r"\end{tabular}", "", r"\par " + _escape_latex(_title(board)) + "."]
    for note in (*board.notes, *RULES, *(_reported(board) if board.reported else [])):
        lines += [r"\par " + _escape_latex(plain(note))]
    return "\n".join(lines)


STYLE = (
    "body{font:14px/1.5 sans-serif;margin:2em;max-width:100%}div{overflow-x:auto}table{border-collapse:collapse}"
    "td,th{padding:.3em .7em;border-bottom:1px solid #ccc;text-align:left;white-space:nowrap}p,li{max-width:60em}"
)


def _html(board: Board) -> str:
    head, *rows = [[html.escape(text) for text in line] for line in _table(board)]
    title = html.escape(_title(board))
    lines = ["<!doctype html>", '<html lang="en">', '<meta charset="utf-8">', f"<title>{title}</title>"]
    lines += [f"<style>{STYLE}</style>", f"<h1>{title}</h1>", "<div><table>"]
    lines += [f"<tr>{''.join(f'<th>{text}</th>' for text in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{text}</td>' for text in line)}</tr>" for line in rows]
    lines += ["</table></div>", *(f"<p>{html.escape(plain(note))}</p>" for note in (*board.notes, *RULES))]
    if board.reported:
        first, *numbers = _reported(board)
        lines += [f"<p>{html.escape(first)}</p>", "<ul>"]
        lines += [*(f"<li>{html.escape(plain(text))}</li>" for text in numbers), "</ul>"]
    return "\n".join([*lines, "</html>"])


# For programs


def _csv(board: Board) -> str:
    """One line a row, numbers with six digits, every estimate in three columns; reported numbers come last, in columns of theirs."""
    three = lambda name: [name, f"{name} low", f"{name} high"]
    ends = lambda e: ["" if e is None or not math.isfinite(x) else f"{x:.6g}" for x in _ends(e)]
    currencies = list(dict.fromkeys(c for r in board.rows for c in r.spent))
    embedders = list(dict.fromkeys(name for r in board.rows for name in r.cmmd))
    head = ["provenance", "rank", "label", "method", *three(f"{board.key} minus {board.baseline}"), "p", "p holm"]
    for c in board.columns:
        head += [*three(f"{c.key} before"), *three(f"{c.key} after"), *three(f"{c.key} difference")]
    head += [part for name in embedders for part in three(f"cmmd {name}")]
    head += [*(f"spent {c}" for c in currencies), "seeds", "single seed", "hack seeds", "invalid", "tuning trials"]
    head += ["reported metric", "reported value", "reported unit", "reported setting", "reported source"]
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(map(plain, head))
    for r in board.rows:
        line = ["measured", "" if r.rank is None else str(r.rank), r.label, r.method, *ends(r.versus)]
        line += ["" if x is None or not math.isfinite(x) else f"{x:.6g}" for x in (r.versus and r.versus.p, r.holm)]
        for c in board.columns:
            mine = r.cells.get(c.key)
            line += [x for e in ((mine.before, mine.after, mine.delta) if mine else (None,) * 3) for x in ends(e)]
        line += [x for name in embedders for x in ends(r.cmmd.get(name))]
        line += [f"{r.spent[c]:.6g}" if c in r.spent else "" for c in currencies]
        line += [" ".join(map(str, r.seeds)), str(r.single_seed).lower(), str(r.hacked), str(r.invalid).lower()]
        line += [str(r.trials)]
        write.writerow([plain(x) for x in line] + [""] * (len(head) - len(line)))
    for one in board.reported:
        line = ["reported", "", one.method, one.method]
        tail = [
            one.metric,
            f"{one.value:g}",
            one.unit,
            one.setting,
            f"arXiv {one.arxiv}, {one.table} ({one.provenance})",
        ]
        write.writerow(line + [""] * (len(head) - len(line) - len(tail)) + tail)
    return out.getvalue()


def _ends(e: Estimate | None) -> tuple[float, float, float]:
    return (e.mean, e.low, e.high) if e else (math.nan, math.nan, math.nan)


def _json(board: Board) -> str:
    """Strict JSON (null, never NaN): what rows share once, then the rows, each number with its interval."""
    first = {
        "schema_version": 1,
        "task": {"name": board.task, "version": board.task_version, "prompts": dict(board.prompts)},
        "base_model": {"id": board.model, "revision": board.weights, "dtype": board.dtype},
        "sampling": {"seed_policy": "noise by (prompt, ordinal, evaluation seed)", **board.evaluation},
        "budget": dict(board.budget),
        "scorers": dict(board.scorers),
        "checkpoint_rule": "the last weights, or their running average where the settings ask for it",
        "key": board.key,
        "baseline": board.baseline,
        "rules": list(RULES),
        "notes": list(board.notes),
        "rows": [_json_row(board, r) for r in board.rows],
        "reported": [{**one.model_dump(), "provenance": {"kind": "reported", "source": one.provenance}} for one in board.reported],
    }  # fmt: skip
    return json.dumps(_finite(first), indent=1, allow_nan=False)


def _json_row(board: Board, r: BoardRow) -> dict[str, Any]:
    metrics: list[dict[str, Any]] = []
    for c in board.columns:
        mine = r.cells.get(c.key)
        if mine is None:
            continue
        entry: dict[str, Any] = {"name": c.key, "role": c.role, "split": board.evaluation.get("split", "test")}
        entry |= {**_estimate(mine.after), "n_images": mine.images, "n_errors": mine.errors}
        entry["before"] = _estimate(mine.before) if mine.before else None
        entry["difference"] = _estimate(mine.delta) if mine.delta else None
        metrics.append(entry)
    return {
        "label": r.label,
        "method": r.method,
        "kind": r.kind,
        "rank": r.rank,
        "settings": dict(r.settings),
        "train_seeds": list(r.seeds),
        "metrics": metrics,
        "cmmd": {name: _estimate(e) for name, e in r.cmmd.items()},
        "versus_baseline": {**_estimate(r.versus), "p_holm": r.holm} if r.versus else None,
        "budget": dict(r.spent),
        "flags": {"hack": r.hacked > 0, "single_seed": r.single_seed, "invalid": r.invalid},
        "hack_seeds": r.hacked,
        "tuning_trials": r.trials,
        "provenance": {"kind": "reproduced", "source": list(r.folders), "revisions": list(r.revisions)},
    }


def _estimate(e: Estimate) -> dict[str, Any]:
    """The keys of a number; what has not been tested has no p."""
    tested = {"p": e.p, "mde": e.mde} if e.p is not None else {}
    estimator = "bootstrap over seeds and prompts" if e.seeds > 1 else "bootstrap over prompts"
    numbers = {"value": e.mean, "stderr": e.se, "ci_low": e.low, "ci_high": e.high, "n_prompts": e.n}
    return {**numbers, **tested, "estimator": estimator}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}  # type: ignore[arg-type]
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
