"""Formats numbers, intervals, ranks, marks and titles for every output of the leaderboards."""

from __future__ import annotations

import math
import re
import unicodedata

from ..bench.stats.intervals import Estimate
from .board import Board, BoardRow

ARROW = "→"
FORMULA_SIGNS = tuple("=+-@＝＋－＠")  # the full-width forms too: East Asian spreadsheets read them alike
MARKS = {
    "s": "one training seed",
    "h": "hack flag",
    "!": "invalid, not ranked",
    "f": "ended by a fault, not ranked",
    "t": "tuned",
}


def number(x: float, digits: int = 3, sign: bool = False) -> str:
    """Format a number as .450 or +.450: without the zero before the point."""
    if not math.isfinite(x):
        return "-"
    return re.sub(r"^([+-]?)0\.(?=\d)", r"\1.", f"{x:{'+' if sign else ''}.{digits}f}")


def cell(e: Estimate | None, sign: bool = False) -> str:
    """Format .450 [.41, .49]: two digits of the ends, more where the interval is narrower than that, and one more of the mean."""
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
    """Format p as <.001 or .012; empty where nothing was tested."""
    return "" if not math.isfinite(p) else "<.001" if p < 0.001 else number(p)


def transfer(row: BoardRow) -> str:
    """Format a transfer ratio as .81 [.62, 1.05]; "not told" where the training scorer does not rise for sure; empty without scores."""
    if row.transfer is None:
        return ""
    r = row.transfer.ratio
    return cell(Estimate(r.ratio, r.low, r.high, r.n)) if r.rises else "not told"


def transfer_head(board: Board) -> str:
    """Name the column of the transfer ratio by its two scores; empty where no row has one."""
    each = next((r.transfer for r in board.rows if r.transfer), None)
    return f"transfer ({each.held_out} over {each.training})" if each else ""


def spend(currency: str, x: float) -> str:
    """Format a spend as 40,000 or 6.72e+12 flops."""
    return f"{x:.2e}" if currency == "flops" else f"{x:,.0f}"


def plain(text: str) -> str:
    """Return one line without the control characters that a foreign name may contain."""
    return "".join("?" if unicodedata.category(c).startswith("C") else c for c in " ".join(text.split()))


def csv_cell(text: str) -> str:
    """Return a cell that a spreadsheet shows as it is: one that it would take for a formula begins with an apostrophe."""
    line = plain(text)
    if line.startswith(FORMULA_SIGNS):
        try:
            float(line)
        except ValueError:
            return f"'{line}"
    return line


def rank(row: BoardRow) -> str:
    """Format the interval of a rank as 2-5, or 2 where both ends are the same."""
    return "-" if row.rank is None else str(row.rank)


def flags(row: BoardRow) -> dict[str, str]:
    """Map letters of MARKS to the marks in words, for the marks that a row has."""
    words = {
        "s": "one seed" if row.single_seed else "",
        "h": "HACK" if row.hack else "",
        "!": "INVALID" if row.invalid else "",
        "f": "FAULT" if row.faults else "",
        "t": f"tuned in {row.trials} trials" if row.trials else "",
    }
    return {letter: text for letter, text in words.items() if text}


def title(board: Board) -> str:
    bounds = ", ".join(f"{plain(str(k))} {v:,.0f}" for k, v in board.budget.items()) or "none"
    n = board.base_row.cells[board.key].after.n
    split = board.evaluation.get("split", "test")
    return (
        f"{plain(board.task)} (version {plain(board.task_version)}) on {plain(board.model)}, budget {bounds}: "
        f"ranked by {plain(board.key)} over {n:,} {plain(str(split))} prompts"
    )


def paper_lines(board: Board) -> list[str]:
    """Format the numbers of papers as lines; they are never part of the table."""
    head = "Reported elsewhere, not measured here and in no test:"
    return [head] + [
        f"  {r.method}, {r.metric}: {r.value:g} {r.unit}{f' ({r.setting})' if r.setting else ''}, "
        f"arXiv {r.arxiv}, {r.table} [{r.provenance}]"
        for r in board.reported
    ]


def escape_markdown(text: str) -> str:
    """Escape the characters that Markdown would interpret."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", text)
