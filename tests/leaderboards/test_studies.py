"""A row over tuning studies: the studies' means are the units that training seeds are in other rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpobench.bench.errors import UserError
from gpobench.bench.stats import intervals
from gpobench.bench.stats.intervals import Contrast
from gpobench.leaderboards.board import BoardRow
from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.runs import load_runs
from gpobench.leaderboards.studies import by_study

Make = Callable[..., Path]
KEY = "other/exact"


def tuned(study: int) -> dict[str, Any]:
    command = f"gpobench tune --method gpo --task ocr --model tiny --trials 5 --seed {study} --budget nfe=9"
    return {"tuning": {"trials": 5, "command": command, "spent": {}}, "config": {"settings": {"lr": 0.1 * (1 + study)}}}


@pytest.fixture
def folder(make: Make, tmp_path: Path, before_and_after: Any) -> Path:
    """Three studies of gpo with two seeds each, whose gains differ by study, and sft."""
    for study, gain in enumerate((0.04, 0.10, 0.16)):
        for seed in (0, 1):
            scores = {key: before_and_after(gain, 10 * study + seed + 1) for key in ("engine/exact", KEY)}
            make(f"gpo-{study}-{seed}", "gpo", seed, scores_by_key=scores, **tuned(study))
    for seed in (0, 1):
        make(f"sft-{seed}", "sft", seed, 0.01)
    return tmp_path


def row(rows: tuple[BoardRow, ...], label: str) -> BoardRow:
    return next(r for r in rows if r.label == label)


def test_studies_are_one_row_whose_units_are_the_means_of_their_seeds(folder: Path) -> None:
    runs = load_runs([folder])
    averaged, notes = by_study(runs)
    board = build_board(averaged, notes=notes)
    over = row(board.rows, "gpo (3 studies)")
    assert over.seeds == (0, 1, 2) and over.trials == 5 and over.verified == "self"
    gains = {r.folder.name: r.gain(KEY) for r in runs if r.record.method == "gpo"}
    means = [np.mean([gains[f"gpo-{study}-{seed}"] for seed in (0, 1)], axis=0) for study in range(3)]
    delta = over.cells[KEY].delta
    assert delta is not None and delta.mean == pytest.approx(np.mean(means)) and delta.seeds == 3
    alone = intervals.crossed([Contrast(means, test=True)])[0]
    assert delta.se > 0.5 * alone.se > 0.01  # the variance between studies is in it
    assert any("study 2: gpo-2-0, gpo-2-1" in note for note in board.notes)
    assert row(board.rows, "sft").seeds == (0, 1)


def test_without_the_option_every_setting_is_a_row(folder: Path) -> None:
    labels = {r.label for r in build_board(load_runs([folder])).rows}
    assert {"gpo (lr=0.1)", "gpo (lr=0.2)"} <= labels and not any("studies" in label for label in labels)


def test_one_study_is_no_spread_of_studies(make: Make, tmp_path: Path) -> None:
    make("a/one", "gpo", 0, 0.1, **tuned(0))
    with pytest.raises(UserError, match="no method here has runs of two tuning studies"):
        by_study(load_runs([tmp_path / "a"]))
    make("b/one", "gpo", 0, 0.1, **tuned(0))
    make("b/two", "gpo", 1, 0.1, **{**tuned(0), "config": {"settings": {"lr": 9}}})
    make("b/three", "gpo", 1, 0.1, **tuned(1))
    with pytest.raises(UserError, match="the runs of study 0 of gpo have different settings: one, two"):
        by_study(load_runs([tmp_path / "b"]))


def test_an_image_without_a_score_under_one_seed_has_none_in_the_mean(folder: Path) -> None:
    runs = load_runs([folder])
    hurt = next(r for r in runs if r.folder.name == "gpo-1-0")
    hurt.after[KEY][3, 1] = np.nan
    averaged, _ = by_study(runs)
    study = next(r for r in averaged if r.record.seed == 1 and r.averaged)
    assert np.isnan(study.after[KEY][3, 1]) and np.isnan(study.after[KEY]).sum() == 1
    assert row(build_board(averaged).rows, "gpo (3 studies)").rank is None  # one of 80 images is too many
