"""Renders a board with all its columns as Markdown, LaTeX and HTML."""

from __future__ import annotations

import html

from .board import RULES, Board
from .columns import in_shown_order
from .formatting import (
    ARROW,
    cell,
    escape_markdown,
    flags,
    p_value,
    paper_lines,
    plain,
    rank,
    spend,
    title,
    transfer,
    transfer_head,
)
from .render_frontier import frontier_sections


def _table(board: Board) -> list[list[str]]:
    """Return head and rows as plain text, not escaped for any format."""
    currencies = list(dict.fromkeys(c for r in board.rows for c in r.spent))
    embedders = list(dict.fromkeys(name for r in board.rows for name in r.cmmd))
    columns = in_shown_order(board)
    head = ["rank", "method", f"{board.key} minus {board.baseline}", "p (Holm)"]
    head += [transfer_head(board)] if transfer_head(board) else []
    for c in columns:
        head += [f"{c.key} ({c.role}): before {ARROW} after", f"{c.key}: difference"]
    head += [*(f"CMMD to the base ({name})" for name in embedders), *currencies, "seeds", "verified", "marks"]
    lines = [head]
    for r in board.rows:
        line = [rank(r), r.label, cell(r.versus, sign=True), p_value(r.holm)]
        line += [transfer(r)] if transfer_head(board) else []
        for c in columns:
            mine = r.cells.get(c.key)
            before = f"{cell(mine.before)} {ARROW} " if mine and mine.before else ""
            line += [before + cell(mine.after), cell(mine.delta, sign=True)] if mine else ["", ""]
        line += [cell(r.cmmd.get(name)) for name in embedders]
        line += [spend(c, r.spent[c]) if c in r.spent else "" for c in currencies]
        line += [", ".join(map(str, r.seeds)), r.verified, "; ".join(flags(r).values())]
        lines.append(line)
    return [[plain(text) for text in line] for line in lines]


def markdown(board: Board) -> str:
    head, *rows = [[escape_markdown(text) for text in line] for line in _table(board)]
    lines = [f"**{escape_markdown(title(board))}**", ""]
    lines += [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
    for note in (*board.notes, *RULES):
        lines += ["", escape_markdown(plain(note))]
    for part in frontier_sections(board):
        lines += ["", f"**{escape_markdown(part.title)}**"]
        for table in part.tables:
            head, *rows = [[escape_markdown(text) for text in line] for line in table]
            lines += ["", *(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))]
        lines += ["", escape_markdown(part.note)]
    if board.reported:
        first, *numbers = paper_lines(board)
        lines += ["", escape_markdown(first), "", *(f"- {escape_markdown(plain(text))}" for text in numbers)]
    return "\n".join(lines)


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "[": "{[}", "]": "{]}", ARROW: r"$\to$", "|": r"\textbar{}",
}  # fmt: skip


def _escape_latex(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)


def latex(board: Board) -> str:
    head, *rows = [[_escape_latex(text) for text in line] for line in _table(board)]
    lines = [rf"\begin{{tabular}}{{{'rl' + 'l' * (len(head) - 2)}}}", r"\hline"]
    lines += [" & ".join(head) + r" \\", r"\hline", *(" & ".join(line) + r" \\" for line in rows)]
    lines += [r"\hline", r"\end{tabular}", "", r"\par " + _escape_latex(title(board)) + "."]
    for part in frontier_sections(board):
        lines += ["", r"\par " + _escape_latex(part.title) + "."]
        for table in part.tables:
            escaped = [" & ".join(map(_escape_latex, line)) + r" \\" for line in table]
            lines += [rf"\par \begin{{tabular}}{{{'l' * len(table[0])}}}", r"\hline", escaped[0], r"\hline"]
            lines += [*escaped[1:], r"\hline", r"\end{tabular}"]
        lines += [r"\par " + _escape_latex(part.note)]
    for note in (*board.notes, *RULES, *(paper_lines(board) if board.reported else [])):
        lines += [r"\par " + _escape_latex(plain(note))]
    return "\n".join(lines)


STYLE = (
    "body{font:14px/1.5 sans-serif;margin:2em;max-width:100%}div{overflow-x:auto}table{border-collapse:collapse}"
    "td,th{padding:.3em .7em;border-bottom:1px solid #ccc;text-align:left;white-space:nowrap}p,li{max-width:60em}"
)


def html_page(board: Board) -> str:
    head, *rows = [[html.escape(text) for text in line] for line in _table(board)]
    heading = html.escape(title(board))
    lines = ["<!doctype html>", '<html lang="en">', '<meta charset="utf-8">', f"<title>{heading}</title>"]
    lines += [f"<style>{STYLE}</style>", f"<h1>{heading}</h1>", "<div><table>"]
    lines += [f"<tr>{''.join(f'<th>{text}</th>' for text in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{text}</td>' for text in line)}</tr>" for line in rows]
    lines += ["</table></div>", *(f"<p>{html.escape(plain(note))}</p>" for note in (*board.notes, *RULES))]
    for part in frontier_sections(board):
        lines += [f"<h2>{html.escape(part.title)}</h2>"]
        for table in part.tables:
            head, *rows = [[html.escape(text) for text in line] for line in table]
            lines += ["<div><table>", f"<tr>{''.join(f'<th>{text}</th>' for text in head)}</tr>"]
            lines += [*(f"<tr>{''.join(f'<td>{text}</td>' for text in line)}</tr>" for line in rows), "</table></div>"]
        lines += [f"<p>{html.escape(part.note)}</p>"]
    if board.reported:
        first, *numbers = paper_lines(board)
        lines += [f"<p>{html.escape(first)}</p>", "<ul>"]
        lines += [*(f"<li>{html.escape(plain(text))}</li>" for text in numbers), "</ul>"]
    return "\n".join([*lines, "</html>"])
