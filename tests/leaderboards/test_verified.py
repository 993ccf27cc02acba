"""Every row says how its numbers were obtained: the lowest level of its runs, by statements that fit their records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpobench.bench.evaluation import record
from gpobench.bench.evaluation.verification import Statement, write_statement
from gpobench.leaderboards.board import BoardRow
from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.render import render
from gpobench.leaderboards.runs import load_runs

Make = Callable[..., Path]


def state(run_dir: Path, level: Any, verdict: Any = "holds") -> None:
    about = record.content_hash(run_dir / "record.json")
    statement = Statement(
        level=level,
        verdict=verdict,
        reason="Because.",
        record=about,
        key="other/exact",
        gain={},
        time="",
        provenance={},
    )
    write_statement(run_dir, statement)


def row(folder: Path, label: str) -> BoardRow:
    return next(r for r in build_board(load_runs([folder])).rows if r.label == label)


def test_a_row_has_the_lowest_level_of_its_runs(make: Make, tmp_path: Path) -> None:
    first, second = make("one", "gpo", 0), make("two", "gpo", 1)
    make("three", "sft", 0)
    assert row(tmp_path, "gpo").verified == "self" and row(tmp_path, "base").verified == ""
    state(first, "audited")
    assert row(tmp_path, "gpo").verified == "self"
    state(second, "rejudged")
    assert row(tmp_path, "gpo").verified == "rejudged"
    state(second, "rerun", "cannot tell")
    assert row(tmp_path, "gpo").verified == "rejudged"
    board = build_board(load_runs([tmp_path]))
    for kind in ("md", "csv", "json", "latex", "html", "terminal"):
        assert "rejudged" in render(board, kind, width=200), kind


def test_a_run_that_does_not_hold_is_named_and_a_foreign_statement_ignored(make: Make, tmp_path: Path) -> None:
    first, second = make("one", "gpo", 0), make("two", "gpo", 1)
    state(first, "rejudged")
    state(second, "rejudged", "does not hold")
    assert row(tmp_path, "gpo").verified == "does not hold"
    notes = build_board(load_runs([tmp_path])).notes
    assert "gpo, seed 1. Verification: does not hold (rejudged): Because." in notes
    (second / "verification.json").write_text((first / "verification.json").read_text())
    assert row(tmp_path, "gpo").verified == "self"
    assert any(
        "1 of 1 statements are about another record" in note for note in build_board(load_runs([tmp_path])).notes
    )
