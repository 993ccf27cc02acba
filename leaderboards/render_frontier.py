"""Texts of a board's section about a search: what it gains at each cost, and from how many served images training is cheaper."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .board import Board
from .formatting import cell, plain
from .frontier import Frontier, ServedImages, TrainedRow

NOTE = (
    "A search pays for every image that is served, training once. From that number of served images a trained image costs fewer "
    "evaluations of the network than the cheapest search that gains as much, and gains more than a search of its cost. Scorer "
    "calls of a search and the spend of tuning are not in it."
)
SINGLE = "The number of candidates that the budget paid for is the only one with a gain: runs of this version keep the others."


@dataclass(frozen=True)
class FrontierSection:
    """A section as plain text: tables of a head and rows, not escaped for any format."""

    title: str
    tables: tuple[list[list[str]], ...]
    note: str


def frontier_sections(board: Board) -> list[FrontierSection]:
    """Return a section for each search of a board."""
    return [_section(frontier) for frontier in board.frontiers]


def candidates_text(f: Frontier) -> str:
    """Name the dearest point of a search, as best-of-8."""
    count = f.points[-1].candidates
    number = f"{count:.4g}" if math.isfinite(count) else "n"
    return f"best-of-{number}" if f.label == "best-of-n" else f"{plain(f.label)} with {number} candidates"


def nfe_text(nfe: float) -> str:
    """Format evaluations of the network for one image, a mean that need not be whole."""
    return f"{nfe:,.0f}" if nfe >= 1000 or nfe == round(nfe) else f"{nfe:.4g}"


def images_text(f: Frontier, row: TrainedRow) -> str:
    """Format a number of served images with its interval, and what bounds it where it is none."""
    if not math.isfinite(row.images.count):
        return "unknown" if math.isnan(row.images.count) else "never: no gain"
    same = row.low == row.images == row.high
    text = _count(row.images) if same else f"{_count(row.images)} {_interval(row)}"
    why = {
        "": "",
        "at most": f": gains more than {candidates_text(f)}",
        "at least": f": gains less than {candidates_text(f)}",
    }
    return text + why[row.images.limit]


def _section(f: Frontier) -> FrontierSection:
    points = [["candidates", "nfe a served image", "gain"]]
    points += [[f"{p.candidates:.4g}", f"{nfe_text(p.nfe)}", cell(p.gain, sign=True)] for p in f.points]
    rows = [["method", "gain", "training nfe", "cheaper and better from, served images"]]
    rows += [[plain(r.label), cell(r.gain, sign=True), f"{r.spent:,.0f}", images_text(f, r)] for r in f.trained]
    title = f"Against {plain(f.label)}, by {plain(f.key)}; an image of the base or of a trained model takes {nfe_text(f.nfe_an_image)} nfe"
    return FrontierSection(
        title, (points, rows) if f.trained else (points,), NOTE if f.is_measured else f"{SINGLE} {NOTE}"
    )


def _count(images: ServedImages) -> str:
    if not math.isfinite(images.count):
        return "never" if math.isinf(images.count) else "-"
    return f"{images.limit} {math.ceil(images.count - 1e-9):,}".strip()


def _interval(row: TrainedRow) -> str:
    if math.isnan(row.low.count) or math.isnan(row.high.count):
        return "[too few]"
    return f"[{_count(row.low)}, {_count(row.high)}]"
