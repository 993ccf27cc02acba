"""A table says how often its test prompts were looked at, and what the best of several settings shows by chance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpobench.bench.evaluation.look_ledger import LEDGER, Look, record_look, setting_hash
from gpobench.bench.evaluation.record import LookEntry
from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.render import render
from gpobench.leaderboards.runs import load_runs

Make = Callable[..., Path]


def look(folder: Path, run: str, settings: Any, seed: int = 0, method: str = "gpo") -> LookEntry:
    facts = {"settings": settings}
    return record_look(
        folder, Look(f"{run}-{seed}", "ocr", "1", "bb", "tiny", method, setting_hash(facts), seed, run, "run")
    )


@pytest.fixture
def folder(make: Make, tmp_path: Path) -> Path:
    """Two runs of gpo, four settings of which were looked at, and one of sft."""
    for trial in range(3):
        look(tmp_path, f"deleted-{trial}", {"lr": trial})
    for seed in (0, 1):
        make(f"gpo-{seed}", "gpo", seed, 0.02, look=look(tmp_path, f"gpo-{seed}", {"lr": 9}, seed))
    for seed in (0, 1):
        make(f"sft-{seed}", "sft", seed, 0.01, look=look(tmp_path, f"sft-{seed}", {"lr": 9}, seed, "sft"))
    return tmp_path


def test_the_counts_and_the_expected_inflation_are_printed(folder: Path) -> None:
    board = build_board(load_runs([folder]))
    notes = "\n".join(board.notes)
    assert "Test looks: 5 looks at these test prompts with gpo (4 settings)." in notes
    assert "Test looks with one setting: sft 2." in notes
    row = next(r for r in board.rows if r.label == "gpo")
    delta = row.cells["other/exact"].delta
    assert delta is not None
    expected = f"{1.0293753730 * delta.se:.3f}".removeprefix("0")  # of four standard normals
    assert f"gpo: Of 4 settings without any gain the best shows a gain of {expected} in other/exact" in notes
    assert "told better than the base in 10 of 100 cases" in notes and "sft: Of" not in notes
    for kind in ("md", "terminal", "html", "latex", "csv", "json"):
        text = render(board, kind, width=100)
        assert "4 settings" in " ".join(text.split()) or kind == "csv"


def test_a_ledger_that_was_cut_or_edited_is_named(folder: Path) -> None:
    file = folder / LEDGER
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    assert any("lacks the looks of sft-1" in note for note in build_board(load_runs([folder])).notes)
    file.write_text("".join(lines[1:]))
    assert any("line 1 does not follow" in note for note in build_board(load_runs([folder])).notes)
    content = json.loads(lines[0])
    file.write_text("".join([json.dumps({**content, "method": "x"}) + "\n", *lines[1:]]))
    assert any("line 1 is damaged or was edited" in note for note in build_board(load_runs([folder])).notes)


def test_runs_that_no_ledger_counts_are_named_and_validation_has_no_looks(make: Make, tmp_path: Path) -> None:
    make("old", "gpo", 0, 0.1)
    make("lost", "nft", 0, 0.1, look=LookEntry(not_recorded="cannot write: Read-only file system"))
    notes = build_board(load_runs([tmp_path])).notes
    assert any("are not counted, as no ledger has all of their runs: " in note and "gpo" in note for note in notes)
    make("on/validation", "gpo", 0, 0.1, config={"evaluation": {"split": "validation", "seed": 1}})
    assert not [note for note in build_board(load_runs([tmp_path / "on"])).notes if "look" in note]
